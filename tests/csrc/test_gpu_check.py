"""benchmarks/gpu_check.py, as far as it runs without a GPU: the same verification of the C++ kernels."""

from __future__ import annotations

import importlib.util
import json
import math
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
@needs.no_gpu.mark
def test_it_checks_and_times_all_that_runs_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run("--device", "cpu", "--quick", "--rounds", "1", "--report", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "every check passed" in lines and not any(line.startswith("FAILED") for line in lines)
    assert sum(line.startswith("ok") for line in lines) > 20
    assert sum("forward + backward, kernels" in line for line in lines) >= 4
    report = json.loads(file.read_text())
    assert report["failed"] == 0 and len(report["checks"]) == sum(line.startswith("ok") for line in lines)
    assert {row["way"] for row in report["kernels"]} == {"eager", "kernels"}
    (row,) = report["training"]
    assert row["run"] == "local" and row["mfu"] is None and row["peak_bytes"] is None  # of a GPU
    assert row["losses"][0] == pytest.approx(math.log(512), rel=0.05) and len(row["losses"]) == 4
    assert row["held_bytes"] > 4 * 512 * 64 and row["tokens_per_second"] > 0
    assert any(check["name"] == "checkpoints of local" for check in report["checks"])
    assert report["machine"]["transformer_engine"] is None


@pytest.mark.slow
@needs.no_gpu.mark
def test_without_a_gpu_it_says_so() -> None:
    done = run("--report", "never written")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--device cpu" in done.stderr and "Traceback" not in done.stderr


@needs.gpu.mark
def test_it_checks_and_times_the_gpu(tmp_path: Path) -> None:
    done = run("--quick", "--rounds", "1", "--report", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check passed" in done.stdout.splitlines()


def test_it_finds_a_wrong_kernel(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = script.CASES[1], torch.device("cpu")
    assert not list(script.failures(case, torch.float32, device))
    right = kernels.combine
    monkeypatch.setattr(kernels, "combine", lambda outputs, logits, blocks: right(outputs, logits, blocks) * 1.001)
    wrong = list(script.failures(case, torch.float32, device))
    assert any(line.startswith("y is off by") for line in wrong) and any("grad keys" in line for line in wrong)


def test_a_check_that_raises_has_failed_and_the_next_one_runs(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    report = script.Report({})

    def crashes() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report.check("first", crashes)
    report.check("second", lambda: None)
    assert [check["wrong"] for check in report.checks] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        None,
    ]
    assert report.failed == 1 and "FAILED first" in capsys.readouterr().out


def test_losses_are_held_to_those_of_the_first_run(script: ModuleType) -> None:
    wrong = script.gpu_training.wrong_losses
    assert wrong([6.0, 5.01], [6.0, 5.0]) is None
    assert wrong([6.0, 5.2], [6.0, 5.0]) == "losses differ by 4.0e-02 (allowed 2e-02)"
    assert "not finite" in wrong([6.0, math.nan], [6.0, 5.0])
