"""benchmarks/gpu_check.py, as far as it runs without a GPU: the same verification of the C++ kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from steel_megatron.ops import kernels
from tests import needs

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
pytestmark = needs.compiled.mark


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """An extension that is there must load, which registers its operators."""
    assert kernels.available()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_check"] = module  # where dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_checks_and_times_the_kernels() -> None:
    done = run("--device", "cpu", "--quick", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "every check passed" in lines and not any(line.startswith("FAILED") for line in lines)
    assert sum(line.startswith("ok") for line in lines) > 20
    assert sum("forward + backward, kernels" in line for line in lines) >= 4


@pytest.mark.slow
@needs.no_gpu.mark
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--device cpu" in done.stderr and "Traceback" not in done.stderr


@needs.gpu.mark
def test_it_checks_and_times_the_gpu() -> None:
    done = run("--quick", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check passed" in done.stdout.splitlines()


def test_it_finds_a_wrong_kernel(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = script.CASES[1], torch.device("cpu")
    assert not list(script.failures(case, torch.float32, device))
    right = kernels.combine
    monkeypatch.setattr(kernels, "combine", lambda outputs, logits, blocks: right(outputs, logits, blocks) * 1.001)
    wrong = list(script.failures(case, torch.float32, device))
    assert any(line.startswith("y is off by") for line in wrong) and any("grad keys" in line for line in wrong)
