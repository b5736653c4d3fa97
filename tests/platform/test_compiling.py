"""torch's compiler is loaded when something is compiled, not when megatron-core is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steel_megatron.platform.compiling import compiled_at_first_call
from tests import needs


@needs.no_gpu.mark
@pytest.mark.timeout(300)
def test_start_up_of_a_run_loads_no_compiler() -> None:
    code = (
        "import sys; from steel_megatron.platform import prepare; prepare(); import steel_megatron.train.loop, torch;"
        "heavy = ('torch._dynamo', 'torch._inductor', 'transformers', 'datasets', 'pandas', 'pyarrow', 'gigatoken');"
        "print([name for name in heavy if name in sys.modules], torch.compile.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] torch"


def test_a_function_is_compiled_once_with_its_options_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []

    def compiler(function: Callable[..., int], **options: Any) -> Callable[..., int]:
        made.append((function.__name__, options))
        return lambda *args, **kwargs: function(*args, **kwargs) + 1

    monkeypatch.setattr(torch, "compile", compiler)
    with compiled_at_first_call():

        @torch.compile
        def double(x: int) -> int:
            """Twice."""
            return 2 * x

        @torch.compile(dynamic=True)
        def triple(x: int, *, add: int = 0) -> int:
            return 3 * x + add

    assert torch.compile is compiler and made == []
    assert (double(2), double(3), triple(1, add=4)) == (5, 7, 8)
    assert made == [("double", {}), ("triple", {"dynamic": True})]
    assert double.__doc__ == "Twice."
