"""csrc/soft_moe_cuda.cu through nvcc for the GPUs it is written for: nothing spills out of registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import needs

pytestmark = [needs.nvcc.mark, needs.compiler.mark]
SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "soft_moe_cuda.cu"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = needs.find_nvcc()
    assert nvcc is not None
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
