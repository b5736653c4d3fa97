"""The CUDA kernels, run on a CPU under the emulation in ``emulation/``, against the reference in float64.

What this checks: the arithmetic, the indices and the barriers of csrc/soft_moe_cuda.cu. What it cannot check: speed,
and what only a GPU's memory model can break.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from steel_megatron.ops import reference

HERE = Path(__file__).resolve().parent
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Sizes(ctypes.Structure):
    """struct Sizes of csrc/soft_moe.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "width", "slots", "refreshes")]


class Emulated:
    """The four passes, with keys as [S, d] and the ends of groups of tokens (csrc/soft_moe.h)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.scratch_bytes.restype = ctypes.c_int64

    def call(self, name: str, sizes: Sizes, dtype: torch.dtype, *arguments: torch.Tensor | bool) -> None:
        converted: list[object] = [ctypes.byref(sizes), TYPES[dtype]]
        for argument in arguments:
            is_tensor = isinstance(argument, torch.Tensor)
            assert not is_tensor or argument.is_contiguous()
            converted.append(ctypes.c_void_p(argument.data_ptr()) if is_tensor else ctypes.c_bool(argument))
        status = getattr(self.library, name)(*converted)
        assert status == 0, f"{name}: CUDA error {status}"

    def scratch(self, sizes: Sizes) -> torch.Tensor:
        """Full of NaN, so that a number read before it is written shows."""
        return torch.full((self.library.scratch_bytes(ctypes.byref(sizes)),), 255, dtype=torch.uint8)

    def dispatch(self, x: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, mix_normalized: bool) -> tuple:
        sizes = Sizes(*x.shape, rows.size(0), ends.numel())
        slots = torch.full((x.size(0), ends.numel(), *rows.shape), float("nan"))
        logits, lse = torch.full((*x.shape[:2], rows.size(0)), float("nan")), torch.full(slots.shape[:3], float("nan"))
        self.call(
            "dispatch_forward", sizes, x.dtype, x, rows, ends, mix_normalized, slots, logits, lse, self.scratch(sizes)
        )
        return slots, logits, lse

    def dispatch_backward(
        self, grad_slots: torch.Tensor, grad_logits: torch.Tensor, given: tuple, made: tuple
    ) -> tuple:
        x, rows, ends, _ = given
        sizes = Sizes(*x.shape, rows.size(0), ends.numel())
        grad_x, grad_rows = torch.full_like(x, float("nan")), torch.full_like(rows, float("nan"))
        arguments = (grad_slots, grad_logits, *given, *made, grad_x, grad_rows)
        self.call("dispatch_backward", sizes, x.dtype, *arguments, self.scratch(sizes))
        return grad_x, grad_rows

    def combine(self, outputs: torch.Tensor, logits: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        sizes = Sizes(outputs.size(0), logits.size(1), outputs.size(3), outputs.size(2), outputs.size(1))
        y = outputs.new_full((outputs.size(0), logits.size(1), outputs.size(3)), float("nan"))
        self.call("combine_forward", sizes, outputs.dtype, outputs, logits, ends, y)
        return y

    def combine_backward(
        self, grad_y: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor, ends: torch.Tensor
    ) -> tuple:
        sizes = Sizes(outputs.size(0), logits.size(1), outputs.size(3), outputs.size(2), outputs.size(1))
        grad_outputs, grad_logits = torch.full_like(outputs, float("nan")), torch.full_like(logits, float("nan"))
        arguments = (grad_y, outputs, logits, ends, grad_outputs, grad_logits)
        self.call("combine_backward", sizes, outputs.dtype, *arguments, self.scratch(sizes))
        return grad_outputs, grad_logits


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("emulation") / "emulated_kernels.so"
    folders = ["-I", str(HERE / "emulation"), "-I", str(HERE.parents[1] / "csrc")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *folders, str(HERE / "emulated_kernels.cpp"), "-o", str(library)], check=True)
    return Emulated(ctypes.CDLL(str(library)))


def run(
    emulated: Emulated, dtype: torch.dtype, shape: tuple[int, int, int, int], refresh: list[int], mix: bool
) -> None:
    """Forward and backward of dispatch, the experts' tanh and combine; every result against the reference's."""
    batch, length, width, slots_count = shape
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, width, generator=generator).to(dtype)
    rows = 3 * reference.unit(torch.randn(slots_count, width, generator=generator))
    weight = torch.randn(batch, length, width, generator=generator).to(dtype)
    blocks = torch.tensor(reference.block_of_token(length, refresh))
    ends = torch.tensor(refresh)
    block_ends = torch.searchsorted(blocks, torch.arange(len(refresh)), right=True)

    given = (x, rows, ends, mix)
    slots, logits, lse = emulated.dispatch(*given)
    outputs = torch.tanh(slots).to(dtype)
    y = emulated.combine(outputs, logits, block_ends)
    grad_outputs, grad_logits = emulated.combine_backward(weight, outputs, logits, block_ends)
    grad_slots = grad_outputs.float() * (1 - torch.tanh(slots).square())
    grad_x, grad_rows = emulated.dispatch_backward(grad_slots, grad_logits, given, (slots, logits, lse))

    right_x, right_rows = x.double().requires_grad_(), rows.double().requires_grad_()
    right_slots, right_logits, right_lse = reference.dispatch(right_x, right_rows.t(), ends, mix)
    right_y = reference.combine(torch.tanh(right_slots), right_logits, blocks)
    right_grad_x, right_grad_rows = torch.autograd.grad(right_y, (right_x, right_rows), weight.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = {
        "slots": (slots, right_slots, 1e-5),  # float32 whatever the tokens are
        "logits": (logits, right_logits, 1e-5),
        "lse": (lse, right_lse, 1e-5),
        "y": (y, right_y, tolerance),
        "grad x": (grad_x, right_grad_x, tolerance),
        "grad keys": (grad_rows, right_grad_rows, tolerance),
    }
    for name, (ours, right, allowed) in pairs.items():
        error = (ours.double() - right).abs().max().item() / max(right.abs().max().item(), 1e-2)
        assert error < allowed, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize(
    ("shape", "refresh"),
    [
        ((2, 5, 7, 3), [5]),
        ((1, 13, 9, 2), [1, 2, 4, 8, 12]),
        ((1, 6, 130, 9), [1, 2, 4]),  # more columns than threads, more slots than a thread's registers
        ((1, 3, 4, 35), [1, 2]),  # more slots than a warp
        ((1, 140, 3, 1), [140]),  # two pieces, several tiles
        ((1, 140, 3, 1), [1, 2, 133]),
        ((1, 1, 4, 2), [1]),
    ],
    ids=str,
)
def test_every_pass_is_the_reference(
    emulated: Emulated, dtype: torch.dtype, shape: tuple[int, int, int, int], refresh: list[int], mix: bool
) -> None:
    run(emulated, dtype, shape, refresh, mix)


def test_the_order_of_threads_does_not_matter(emulated: Emulated) -> None:
    """A missing barrier would show: each seed lets the threads of a block run in another order."""
    given = (torch.randn(1, 40, 6), torch.randn(3, 6), torch.tensor([4, 36]), True)
    grad_slots, grad_logits = torch.randn(1, 2, 3, 6), torch.randn(1, 40, 3)
    results = []
    for seed in range(3):
        emulated.library.set_seed(seed)
        forward = emulated.dispatch(*given)
        results.append((*forward, *emulated.dispatch_backward(grad_slots, grad_logits, given, forward)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ends_that_do_not_ascend_stay_within_memory(emulated: Emulated) -> None:
    """On a device nobody looks at the ends before they are used; wrong ones may give nonsense, but no stray access."""
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(1, 300, 3, generator=generator), torch.randn(2, 3, generator=generator)
    ends = torch.tensor([300, 1, 400, -5, 300, 2, 299])
    sizes = Sizes(1, 300, 3, 2, ends.numel())
    scratch, guard = emulated.scratch(sizes), 4096
    guarded = torch.full((scratch.numel() + guard,), 255, dtype=torch.uint8)
    slots, logits, lse = torch.zeros(1, 7, 2, 3), torch.zeros(1, 300, 2), torch.zeros(1, 7, 2)
    emulated.call("dispatch_forward", sizes, x.dtype, x, rows, ends, False, slots, logits, lse, guarded)
    assert (guarded[scratch.numel() :] == 255).all()
    right, _, _ = reference.dispatch(x, rows.t(), torch.tensor([300]), False)
    torch.testing.assert_close(slots[0, 0], right[0, 0])
