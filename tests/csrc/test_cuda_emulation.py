"""The CUDA kernels, run on a CPU under the emulation in ``emulation/``, against the reference in float64.

What this checks: the arithmetic, the indices and the barriers of csrc/soft_moe_cuda.cu. What it cannot check: speed,
and what only a GPU's memory model can break.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from steel_megatron.ops import reference
from steel_megatron.ops.plan import block_plan
from tests import needs

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PASSES = ("dispatch_forward", "dispatch_backward", "combine_forward", "combine_backward")  # as enum class Pass


class Sizes(ctypes.Structure):
    """struct Sizes of csrc/soft_moe.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "width", "slots", "blocks", "plans")]


@dataclass(frozen=True)
class Plan:
    """Blocks as the kernels take them: int64 [N, R], and the blocks of the tokens [N, T] as the reference does."""

    starts: torch.Tensor
    ends: torch.Tensor
    block_of_token: torch.Tensor

    @property
    def reads(self) -> torch.Tensor:
        """Where the tokens that read each block end."""
        return torch.stack(
            [torch.searchsorted(row, torch.arange(self.ends.size(1)), right=True) for row in self.block_of_token]
        )


@dataclass(frozen=True)
class Case:
    """Shapes, blocks and tokens of one comparison."""

    shape: tuple[int, int, int, int]  # B, T, d, S
    block_length: int | None = None
    documents: list[list[int]] | None = None  # where the documents of each sequence begin
    blocks: tuple[list[int], list[int], list[int]] | None = None  # starts, ends and reads, by hand
    mix: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    zero: list[int] = field(default_factory=list)  # tokens of zeros
    equal: bool = False  # tokens that are all the same

    def plan(self) -> Plan:
        length = self.shape[1]
        if self.blocks is not None:
            starts, ends, reads = (torch.tensor([row]) for row in self.blocks)
            return Plan(starts, ends, torch.searchsorted(reads[0], torch.arange(length), right=True).unsqueeze(0))
        document_starts = None
        if self.documents is not None:
            tokens = torch.arange(length)
            rows = [
                torch.tensor(begins)[torch.searchsorted(torch.tensor(begins), tokens, right=True) - 1]
                for begins in self.documents
            ]
            document_starts = torch.stack(rows)
        made = block_plan(length, self.block_length, torch.device("cpu"), document_starts)
        return Plan(made.starts, made.ends, made.block_of_token)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T, d] in the case's type, and keys [S, d]."""
        batch, length, width, slots = self.shape
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(batch, 1 if self.equal else length, width, generator=generator).expand(batch, length, width)
        x = x.to(self.dtype).contiguous()
        x[:, self.zero] = 0.0
        return x, self.scale * reference.l2_normalize(torch.randn(slots, width, generator=generator))


class Emulated:
    """The four passes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.scratch_bytes.restype = ctypes.c_int64

    def scratch(self, name: str, sizes: Sizes, guard: int = 0) -> torch.Tensor:
        """Full of NaN, so that a number read before it is written shows."""
        size = self.library.scratch_bytes(PASSES.index(name), ctypes.byref(sizes))
        return torch.full((size + guard,), 255, dtype=torch.uint8)

    def call(self, name: str, sizes: Sizes, dtype: torch.dtype, *arguments: torch.Tensor | bool) -> None:
        guard = 4096
        scratch = self.scratch(name, sizes, guard)
        converted: list[object] = [ctypes.byref(sizes), TYPES[dtype]]
        for argument in (*arguments, scratch):
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                converted.append(ctypes.c_bool(argument))
        status = getattr(self.library, name)(*converted)
        assert status == 0, f"{name}: CUDA error {status}"
        assert (scratch[-guard:] == 255).all(), f"{name} wrote past its scratch memory"

    def dispatch(self, x: torch.Tensor, rows: torch.Tensor, plan: Plan, mix: bool) -> tuple[torch.Tensor, ...]:
        sizes = Sizes(*x.shape, rows.size(0), plan.ends.size(1), len(plan.ends))
        slots = nan(x.size(0), plan.ends.size(1), *rows.shape)
        logits, lse = nan(*x.shape[:2], rows.size(0)), nan(*slots.shape[:3])
        self.call("dispatch_forward", sizes, x.dtype, x, rows, plan.starts, plan.ends, mix, slots, logits, lse)
        return slots, logits, lse

    def dispatch_backward(
        self,
        gradients: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        rows: torch.Tensor,
        plan: Plan,
        mix: bool,
        made: tuple,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = Sizes(*x.shape, rows.size(0), plan.ends.size(1), len(plan.ends))
        grad_x, grad_rows = torch.full_like(x, float("nan")), torch.full_like(rows, float("nan"))
        arguments = (*gradients, x, rows, plan.starts, plan.ends, mix, *made, grad_x, grad_rows)
        self.call("dispatch_backward", sizes, x.dtype, *arguments)
        return grad_x, grad_rows

    def combine(self, outputs: torch.Tensor, logits: torch.Tensor, plan: Plan) -> torch.Tensor:
        y = outputs.new_full((outputs.size(0), logits.size(1), outputs.size(3)), float("nan"))
        self.call("combine_forward", sizes_of(outputs, logits, plan), outputs.dtype, outputs, logits, plan.reads, y)
        return y

    def combine_backward(
        self, grad_y: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_outputs, grad_logits = torch.full_like(outputs, float("nan")), torch.full_like(logits, float("nan"))
        arguments = (grad_y, outputs, logits, plan.reads, grad_outputs, grad_logits)
        self.call("combine_backward", sizes_of(outputs, logits, plan), outputs.dtype, *arguments)
        return grad_outputs, grad_logits


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def sizes_of(outputs: torch.Tensor, logits: torch.Tensor, plan: Plan) -> Sizes:
    batch, blocks, slots, width = outputs.shape
    return Sizes(batch, logits.size(1), width, slots, blocks, len(plan.ends))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    compiler = needs.cxx()
    if compiler is None:
        needs.compiler.missing()
    library = tmp_path_factory.mktemp("emulation") / "emulated_kernels.so"
    folders = ["-I", str(HERE / "emulation"), "-I", str(HERE.parents[1] / "csrc")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, *folders, str(HERE / "emulated_kernels.cpp"), "-o", str(library)], check=True)
    return Emulated(ctypes.CDLL(str(library)))


def results(emulated: Emulated, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All passes with tanh as the experts and a loss on y, slots, logits and lse: the kernels', and the reference's."""
    (x, rows), plan = case.tensors(), case.plan()
    slots, logits, lse = emulated.dispatch(x, rows, plan, case.mix)
    generator = torch.Generator().manual_seed(1)
    weight_y = torch.randn(x.shape, generator=generator).to(case.dtype)
    weight_logits, weight_lse = (torch.randn(v.shape, generator=generator) for v in (logits, lse))
    outputs = torch.tanh(slots).to(case.dtype)
    y = emulated.combine(outputs, logits, plan)
    grad_outputs, grad_logits = emulated.combine_backward(weight_y, outputs, logits, plan)
    grad_slots = grad_outputs.float() * (1 - torch.tanh(slots).square())
    gradients = (grad_slots, grad_logits + weight_logits, weight_lse)
    grad_x, grad_rows = emulated.dispatch_backward(gradients, x, rows, plan, case.mix, (slots, logits, lse))
    ours = {"slots": slots, "logits": logits, "lse": lse, "y": y, "grad x": grad_x, "grad keys": grad_rows}

    leaves = x.double().requires_grad_(), rows.double().requires_grad_()
    right_slots, right_logits, right_lse = reference.dispatch(
        leaves[0], leaves[1].t(), plan.starts, plan.ends, case.mix
    )
    right_y = reference.combine(torch.tanh(right_slots), right_logits, plan.block_of_token)
    filled = plan.starts < plan.ends  # an empty block's is minus infinity
    seen_lse = torch.where(filled.unsqueeze(-1), right_lse, 0.0)
    loss = (right_y * weight_y).sum() + (right_logits * weight_logits).sum() + (seen_lse * weight_lse).sum()
    right_gradients = torch.autograd.grad(loss, leaves)
    right = (right_slots, right_logits, right_lse, right_y, *right_gradients)
    return ours, dict(zip(ours, right, strict=True))


def assert_close(ours: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerances: dict[str, float]) -> None:
    """Errors relative to the largest entry; minus infinity must be where it is in the reference."""
    for name, value in ours.items():
        finite = right[name].isfinite()
        assert torch.equal(value.double()[~finite], right[name][~finite]), name
        size = max(right[name][finite].abs().max().item(), 0.1)
        error = (value.double()[finite] - right[name][finite]).abs().max().item() / size
        assert error < tolerances.get(name, tolerances["else"]), f"{name}: {error:.1e}"


EXACT = {"else": 2e-5}
# Slots, logits and log-sum-exp are float32 whatever the tokens are.
ROUNDED = {**dict.fromkeys(("slots", "logits", "lse"), 2e-5)}
TOLERANCES = {
    torch.float32: EXACT,
    torch.bfloat16: {**ROUNDED, "else": 1e-2},
    torch.float16: {**ROUNDED, "else": 2e-3},
}

CASES = {
    "one document": Case((2, 5, 8, 3)),
    "refreshes": Case((1, 13, 12, 2), 4, mix=True),
    "one token": Case((1, 1, 4, 2), 8, mix=True),
    "one slot, several chunks": Case((1, 100, 4, 1)),
    "refreshes across chunks": Case((2, 70, 4, 2), 16),
    "more slots than a tile": Case((1, 37, 8, 9), 8, mix=True),
    "many slots": Case((1, 3, 4, 35), 1),
    "more columns than a tile": Case((1, 3, 2052, 2)),
    "columns that are not aligned": Case((2, 6, 1030, 3), 2, mix=True),
    "documents": Case((2, 41, 4, 2), None, [[0, 7, 8, 39], [0]], mix=True),
    "documents and refreshes": Case((2, 41, 8, 3), 8, [[0, 17, 18], [0, 33, 40]]),
    "documents, more slots than a tile": Case((2, 20, 4, 10), 8, [[0, 7], [0]]),
    "gaps and empty blocks": Case(
        (1, 40, 4, 3), blocks=([2, 2, 2, 12, 20, 40], [5, 9, 9, 12, 36, 40], [3, 9, 9, 22, 38, 40])
    ),
    "a block that nobody reads": Case((2, 9, 4, 2), blocks=([0, 0, 4], [4, 4, 9], [0, 9, 9]), mix=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_pass_is_the_reference(emulated: Emulated, name: str) -> None:
    assert_close(*results(emulated, CASES[name]), EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["refreshes", "more slots than a tile", "documents", "columns that are not aligned"])
def test_half_precision_is_the_reference(emulated: Emulated, name: str, dtype: torch.dtype) -> None:
    assert_close(*results(emulated, replace(CASES[name], dtype=dtype)), TOLERANCES[dtype])


@pytest.mark.parametrize("mix", [True, False])
def test_equal_tokens(emulated: Emulated, mix: bool) -> None:
    assert_close(*results(emulated, Case((1, 20, 4, 3), 8, mix=mix, equal=True)), EXACT)


@pytest.mark.parametrize("mix", [True, False])
def test_huge_logits(emulated: Emulated, mix: bool) -> None:
    """A logit of 1e4 is known to 1e-3 in float32, and its exponential no better; nothing overflows."""
    case = Case((1, 20, 4, 3), 8, mix=mix, scale=1e4)
    ours, right = results(emulated, case)
    assert all(value.isfinite().all() for value in ours.values())
    assert_close(ours, right, {"else": 5e-3})


@pytest.mark.parametrize("mix", [True, False])
def test_zero_vectors(emulated: Emulated, mix: bool) -> None:
    case = Case((1, 20, 4, 3), 8, mix=mix, zero=[0, 5, 19])
    ours, right = results(emulated, case)
    assert right["grad x"][:, case.zero].abs().max() > 1e9  # the gradient of x / 1e-12, as autograd has it
    torch.testing.assert_close(
        ours["grad x"][:, case.zero].double(), right["grad x"][:, case.zero], rtol=1e-3, atol=1e6
    )
    for result in (ours, right):
        result["grad x"][:, case.zero] = 0.0
    assert_close(ours, right, EXACT)


def test_nan_stays_in_its_document(emulated: Emulated) -> None:
    case = CASES["documents and refreshes"]
    (x, rows), plan = case.tensors(), case.plan()
    x[0, 20] = float("nan")  # in the third document of the first sequence
    slots, logits, _ = emulated.dispatch(x, rows, plan, False)
    y = emulated.combine(slots, logits, plan)
    assert y[0, 26:].isnan().all() and y[0, :18].isfinite().all() and y[1].isfinite().all()
    gradients = torch.ones_like(slots), torch.ones_like(logits), torch.zeros(slots.shape[:3])
    grad_x, _ = emulated.dispatch_backward(gradients, x, rows, plan, False, emulated.dispatch(x, rows, plan, False))
    assert grad_x[0, 18:21].isnan().any() and grad_x[0, :18].isfinite().all() and grad_x[1].isfinite().all()


def test_the_order_of_threads_does_not_matter(emulated: Emulated) -> None:
    """A missing barrier would show: each seed lets the threads of a block run in another order."""
    case = Case((1, 40, 8, 3), 16, mix=True)
    made = []
    for seed in range(3):
        emulated.library.set_seed(seed)
        made.append(results(emulated, case)[0])
    for other in made[1:]:
        assert all(torch.equal(made[0][name], other[name]) for name in other)


def test_later_tokens_do_not_change_a_bit(emulated: Emulated) -> None:
    case = Case((1, 70, 4, 2), 8)
    (x, rows), plan = case.tensors(), case.plan()
    changed = x.clone()
    changed[:, 40:] *= -50
    made = []
    for tokens in (x, changed):
        slots, logits, _ = emulated.dispatch(tokens, rows, plan, False)
        made.append(emulated.combine(torch.tanh(slots), logits, plan)[:, :40])
    assert torch.equal(*made)


def test_wrong_blocks_stay_within_memory(emulated: Emulated) -> None:
    """On a device nobody looks at the blocks before they are used; wrong ones give nonsense, but no stray access."""
    ends = torch.tensor([[70, 1, 400, -5, 70, 2, 69]])
    starts = torch.tensor([[-3, 500, 0, 7, 69, -1, 70]])
    plan = Plan(starts, ends, torch.zeros(1, 70, dtype=torch.int64))
    sizes, generator = Sizes(1, 70, 4, 2, 7, 1), torch.Generator().manual_seed(0)
    x, rows = torch.randn(1, 70, 4, generator=generator), torch.randn(2, 4, generator=generator)
    made = emulated.dispatch(x, rows, plan, False)  # each call looks behind its scratch memory
    guarded = [guard(shape) for shape in ((1, 70, 4), (2, 4), (1, 7, 2, 4), (1, 70, 2))]
    gradients = tuple(torch.ones_like(value) for value in made)
    emulated.call("dispatch_backward", sizes, x.dtype, *gradients, x, rows, starts, ends, False, *made, *guarded[:2])
    outputs = torch.randn(1, 7, 2, 4, generator=generator)
    emulated.call("combine_forward", sizes, x.dtype, outputs, made[1], ends, guarded[0])
    emulated.call("combine_backward", sizes, x.dtype, x, outputs, made[1], ends, guarded[2], guarded[3])
    assert all((value.untyped_storage().size() == value.nbytes + 4096) and behind(value) == {7.0} for value in guarded)


def guard(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with 1,024 numbers of 7 behind it."""
    size = torch.Size(shape).numel()
    return torch.full((size + 1024,), 7.0)[:size].view(shape)


def behind(value: torch.Tensor) -> set[float]:
    whole = torch.empty(0).set_(value.untyped_storage())
    return set(whole[value.numel() :].tolist())


def test_sizes_beyond_a_grid_are_refused(emulated: Emulated) -> None:
    """Nothing is read or written: the launch is refused before."""
    x, plan = torch.zeros(1), torch.ones(1, 1, dtype=torch.int64)
    sizes = Sizes(2**31, 64, 4, 1, 1, 1)
    arguments = [
        ctypes.byref(sizes),
        0,
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, x, plan, plan)),
        ctypes.c_bool(True),
    ]
    invalid_configuration = 9
    pointers = [ctypes.c_void_p(x.data_ptr())] * 4
    assert emulated.library.dispatch_forward(*arguments, *pointers) == invalid_configuration


def test_float16_is_torchs(emulated: Emulated) -> None:
    """The conversion in software, for all 65,536 float16 and the floats between neighbours of them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = torch.empty(2**16)
    emulated.library.from_float16(
        ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(2**16), ctypes.c_void_p(values.data_ptr())
    )
    right = bits.view(torch.float16).float()
    assert torch.equal(values.nan_to_num(nan=1e9), right.nan_to_num(nan=1e9)) and torch.equal(
        values.isnan(), right.isnan()
    )
    ordered = right[right.isfinite()].sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = (torch.nextafter(middle, torch.tensor(side)) for side in (-1e9, 1e9))
    special = torch.tensor(
        [65519.9, 65520.0, 1e9, -1e9, 1e-9, 2.0**-25, 2.0**-25 * 1.001, float("inf"), float("nan"), -0.0]
    )
    floats = torch.cat((ordered, middle, *near, special))
    made = torch.empty(len(floats), dtype=torch.int16)
    emulated.library.to_float16(
        ctypes.c_void_p(floats.data_ptr()), ctypes.c_int64(len(floats)), ctypes.c_void_p(made.data_ptr())
    )
    number = floats.isfinite() | floats.isinf()
    assert torch.equal(made[number], floats.half().view(torch.int16)[number])
    assert made.view(torch.float16)[~number].isnan().all()
