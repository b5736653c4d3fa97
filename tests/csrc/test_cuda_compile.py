"""csrc/soft_moe_cuda.cu through nvcc for the GPUs it is written for: nothing spills out of registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "soft_moe_cuda.cu"


def find_nvcc() -> str | None:
    """nvcc in PATH, in CUDA_HOME or where it is usually installed, or from the package nvidia-cuda-nvcc."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvcc")
    candidates = [
        shutil.which("nvcc"),
        *(f"{folder}/bin/nvcc" for folder in folders if folder),
        *map(str, sorted(packaged)),
    ]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc in PATH, CUDA_HOME or the package nvidia-cuda-nvcc")
    command = [nvcc, f"-arch={architecture}", "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    run = subprocess.run(
        [*command, str(SOURCE), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    sources = [SOURCE, *SOURCE.parent.glob("cuda_*.h")]
    kernels = set(re.findall(r"__global__ void.*?(\w+_kernel)\(", " ".join(s.read_text() for s in sources)))
    assert len(kernels) >= 10
    # Of each kernel, the most registers of its types; ptxas names a kernel before it counts.
    registers: dict[str, int] = {}
    for symbol, count in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", run.stderr, re.DOTALL):
        name = next(re.sub(r"^\d+", "", n) for n in re.findall(r"\d+[a-z_]+_kernel", symbol))
        registers[name] = max(registers.get(name, 0), int(count))
    for name, most in sorted(registers.items()):
        print(f"{architecture}: {name}: {most} registers")
    assert set(registers) == kernels
    assert all(frame == ("0", "0", "0") for frame in frames), run.stderr
    assert max(registers.values()) <= 128  # two blocks of 256 threads on a multiprocessor
