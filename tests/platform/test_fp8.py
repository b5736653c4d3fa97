"""FP8 is refused where it cannot run, before anything is started."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from steel_megatron.config import ParallelConfig, TrainingConfig
from steel_megatron.errors import ConfigError
from steel_megatron.platform import Implementation, fp8
from steel_megatron.train import loop
from tests.train.small_run import small_run


def test_a_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(*args: Any) -> None:
        raise AssertionError("the processes have met")

    monkeypatch.setattr(loop, "initialize", meet)
    run = small_run(ParallelConfig())
    run = dataclasses.replace(run, training=TrainingConfig(precision="bfloat16", fp8="hybrid"))
    for missing in (["a GPU", "transformer-engine"], ["a GPU"]):
        monkeypatch.setattr(loop, "missing_for_fp8", lambda missing=missing: missing)
        with pytest.raises(
            ConfigError, match=rf"^training\.fp8 = hybrid needs {' and '.join(missing)}; leave it unset here$"
        ):
            loop.pretrain(run)
    monkeypatch.setattr(loop, "missing_for_fp8", list)
    with pytest.raises(ConfigError, match=r"^training\.fp8 = hybrid has no effect with model\.implementation = auto: "):
        loop.pretrain(run)
    monkeypatch.setattr(loop, "choose_implementation", lambda wanted, **_: Implementation("2.20.2"))
    with pytest.raises(AssertionError, match="have met"):
        loop.pretrain(run)


@pytest.mark.parametrize(
    ("device", "capability", "engine", "expected"),
    [
        ("cpu", None, False, ["a GPU", "transformer-engine"]),
        ("cpu", None, True, ["a GPU"]),
        ("cuda", (8, 0), True, [r"a GPU of compute capability 8.9 or above (this one has 8.0)"]),
        ("cuda", (9, 0), False, ["transformer-engine"]),
        ("cuda", (8, 9), True, []),
    ],
)
def test_missing_parts(
    device: str, capability: Any, engine: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(fp8.probe(), device=torch.device(device))
    monkeypatch.setattr(fp8, "probe", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if engine else None)
    assert [one.split(" (pip")[0] for one in fp8.missing_for_fp8()] == expected


def test_settings() -> None:
    with pytest.raises(ConfigError, match="fp8 is hybrid with precision = float32; what is not in FP8 is in bfloat16"):
        TrainingConfig(fp8="hybrid")
    wrong: Any = "e5m2"
    with pytest.raises(ConfigError, match=r"TrainingConfig\.fp8 is 'e5m2'; it must be"):
        TrainingConfig(fp8=wrong, precision="bfloat16")
