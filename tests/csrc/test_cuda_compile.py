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
    kernels = SOURCE.read_text().count("__global__ void")
    assert len(frames) >= kernels, run.stderr  # templates are compiled once for every type
    assert all(frame == ("0", "0", "0") for frame in frames), run.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    print(f"{architecture}: {len(frames)} kernels, {max(registers)} registers at most")
    assert max(registers) <= 128  # 4 warps a block: at least 16 warps on a multiprocessor
