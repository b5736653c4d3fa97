"""What some tests need that not every machine has: the only place that skips a test.

Every skip has a remedy. A run ends with a line per need: how many tests it skipped, and the command that brings them
back. A skip for any other reason makes the run fail.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.hf import suite

SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NEEDS: dict[str, Need] = {}
"""By the reason of their skips."""


@dataclass(frozen=True)
class Need:
    """Something that a machine may lack.

    Attributes:
        what: its name, as it goes with "needs".
        remedy: a command, or what to do.
        met: whether it is here; asked when a test file is collected that marks its tests.
    """

    what: str
    remedy: str
    met: Callable[[], bool]

    def __post_init__(self) -> None:
        NEEDS[self.reason] = self

    @property
    def reason(self) -> str:
        """What pytest reports."""
        return f"needs {self.what}"

    @property
    def mark(self) -> pytest.MarkDecorator:
        """A mark that skips where it is missing."""
        return pytest.mark.skipif(not self.met(), reason=self.reason)

    def missing(self) -> NoReturn:
        """Skip the running test, which has found it missing."""
        pytest.skip(self.reason)


def cxx() -> str | None:
    """The C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++"))


def find_nvcc() -> str | None:
    """The nvcc of the package nvidia-cuda-nvcc, so that everybody compiles with the same one; else the machine's."""
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvcc"))
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [*packaged, shutil.which("nvcc"), *(Path(folder, "bin", "nvcc") for folder in toolkits if folder)]
    return next((str(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def _compiled() -> bool:
    return all(importlib.util.find_spec(f"steel_megatron.{name}") is not None for name in ("_C", "_index"))


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available() and _compiled() and importlib.import_module("steel_megatron._C").WITH_CUDA


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _slurm() -> bool:
    return all(shutil.which(name) is not None for name in SLURM_PROGRAMS)


compiled = Need("the compiled extension", "make clean && make setup, without STEEL_NO_EXT", _compiled)
compiler = Need("a C++ compiler", "apt-get install g++", lambda: cxx() is not None)
nvcc = Need("nvcc", "pip install nvidia-cuda-nvcc nvidia-cuda-runtime", lambda: find_nvcc() is not None)
gpu = Need("a GPU", "STEEL_CUDA=1 make setup && .venv/bin/python benchmarks/gpu_check.py on a GPU machine", _gpu)
no_gpu = Need("a machine without a GPU", "CUDA_VISIBLE_DEVICES= make test", _no_gpu)
transformer_engine = Need(
    "transformer-engine",
    "pip install --no-build-isolation -e '.[cuda]', with a CUDA build of torch; no GPU is needed",
    lambda: importlib.util.find_spec("transformer_engine") is not None,
)
slurm = Need("Slurm", "apt-get install slurmctld slurmd slurm-client", _slurm)
common_suite = Need(
    f"the tests of transformers {suite.TESTED}",
    f"with transformers {suite.TESTED}, .venv/bin/python -m tests.hf.suite, which needs a network (make setup runs it)",
    suite.is_here,
)
mount = Need("to mount a file system", "run the tests as root, in a container with CAP_SYS_ADMIN", lambda: True)


def _skips(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Skipped tests by reason; the reports of other processes have the same form."""
    reports = [report.longrepr for report in reporter.stats.get("skipped", [])]
    texts = [longrepr[2] if isinstance(longrepr, tuple) else str(longrepr) for longrepr in reports]
    return Counter(text.removeprefix("Skipped: ") for text in texts)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run with a skip that has no remedy has failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # none in a worker
    if reporter is not None and session.exitstatus == 0 and _skips(reporter).keys() - NEEDS.keys():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped, and how to run it."""
    skips = _skips(terminalreporter)
    if skips:
        terminalreporter.section("skipped, and what brings them back")
    for reason, count in sorted(skips.items()):
        tests = "1 test" if count == 1 else f"{count} tests"
        need = NEEDS.get(reason)
        if need is None:
            terminalreporter.line(f"error: {tests} skipped without a remedy ({reason}): use tests/needs.py", red=True)
        else:
            terminalreporter.line(f"{tests} {'needs' if count == 1 else 'need'} {need.what}: {need.remedy}")
