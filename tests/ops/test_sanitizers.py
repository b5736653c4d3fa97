"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, without torch and Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import needs

pytestmark = needs.compiler.mark
ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "tests/ops/sanitizers/run_kernels.cpp",
    *(ROOT / "csrc" / name for name in ("soft_moe_cpu.cpp", "combine_cpu.cpp", "rows.cpp")),
]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    compiler = needs.cxx()
    assert compiler is not None
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=fast", f"-fsanitize={sanitizers}"]
    includes = ["-I", ROOT / "tests/ops/sanitizers", "-I", ROOT / "csrc"]  # the stand-in for ATen first
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    compiling = [
        subprocess.Popen(
            [compiler, *flags, "-fno-sanitize-recover=all", *includes, "-c", source, "-o", compiled],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, compiled in zip(SOURCES, objects, strict=True)
    ]
    for process in compiling:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = tmp_path / "run_kernels"
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("ATEN_CPU_CAPABILITY", None)  # all that the machine has
    for limit in ({}, *({"ATEN_CPU_CAPABILITY": capability} for capability in ("avx512", "avx2", "default"))):
        run = subprocess.run(
            [program],
            env={**environment, **limit},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.endswith(" cases\n") and not run.stderr
