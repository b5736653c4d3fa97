"""The compiled kernels against the reference in float64: results, gradients, threads, and torch's own checks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.ops import combine, dispatch, kernels, reference
from steel_megatron.ops.plan import BlockPlan, block_plan
from tests import needs

pytestmark = needs.compiled.mark


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """An extension that is there must load, which registers its operators."""
    assert kernels.available()


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one comparison; ``block_length`` None is mode ``sequence``.

    ``documents``: the positions at which a document begins, for each sequence (taken in turn); None: one document.
    """

    batch: int
    length: int
    width: int
    experts: int
    slots: int
    block_length: int | None
    mix_normalized: bool
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    documents: tuple[tuple[int, ...], ...] | None = None

    def document_starts(self) -> torch.Tensor | None:
        """The position of the first token of each token's document, [B, T]."""
        if self.documents is None:
            return None
        rows = [self.documents[b % len(self.documents)] for b in range(self.batch)]
        return torch.tensor([[max((s for s in row if s <= t), default=0) for t in range(self.length)] for row in rows])

    def plan(self) -> BlockPlan:
        """The blocks."""
        return block_plan(self.length, self.block_length, torch.device("cpu"), self.document_starts())

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """x in the case's type, and keys."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.length, self.width, generator=generator).to(self.dtype)
        phi = torch.randn(self.width, self.experts, self.slots, generator=generator)
        return x, reference.slot_keys(phi, torch.tensor([self.scale]))


NAMES = ("slots", "logits", "lse", "y", "grad x", "grad keys")


def layer(module: ModuleType, case: Case, x: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer whose experts are tanh, and the gradients of a fixed random loss; every number named."""
    return planned_layer(module, case.plan(), case.mix_normalized, x, keys)


def planned_layer(
    module: ModuleType, plan: BlockPlan, mix_normalized: bool, x: torch.Tensor, keys: torch.Tensor
) -> dict[str, torch.Tensor]:
    """As :func:`layer`, with any plan. The loss is of the layer's result and of the log-sum-exp, where it is finite."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, keys)]
    slots, logits, lse = module.dispatch(*leaves, plan.starts, plan.ends, mix_normalized)
    y = module.combine(torch.tanh(slots), logits, plan.block_of_token)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator).to(x.dtype).to(y.dtype)
    lse_weight = torch.randn(lse.shape, generator=generator).to(lse.dtype).masked_fill(lse.detach().isinf(), 0.0)
    gradients = torch.autograd.grad((y, lse), leaves, (weight, lse_weight))
    return dict(zip(NAMES, (slots, logits, lse, y, *gradients), strict=True))


def exact(case: Case, x: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reference in float64 on the same (rounded) inputs."""
    return layer(reference, case, x.double(), keys.double())


def assert_float32_close(
    ours: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Errors relative to the largest entry; one that cancels to nothing is held to the size of its terms, about 0.1."""
    for name in NAMES:
        finite = right[name].isfinite()
        assert torch.equal(ours[name].isneginf(), ~finite), name  # the log-sum-exp of empty blocks, and nothing else
        a, b = ours[name].double()[finite], right[name][finite]
        if not len(b):
            continue
        error = (a - b).abs().max().item() / max(b.abs().max().item(), 0.1)
        assert error < tolerance, f"{name}: {error:.1e}"


PACKED = ((0, 1, 2, 11, 30), (0, 5), (0,), (0, 36))  # documents of one token, of nearly all
CASES = [
    Case(2, 37, 19, 3, 2, None, True),
    Case(2, 37, 19, 3, 2, 5, False),
    Case(3, 600, 64, 6, 1, None, False),  # several pieces
    Case(2, 601, 70, 6, 1, 16, True),  # ragged last block, width no multiple of a vector
    Case(1, 300, 33, 2, 9, 7, False),  # more slots than a register block
    Case(1, 40, 5, 40, 2, 3, True),  # more slots than tokens
    Case(2, 200, 130, 32, 2, None, True),  # tiles of the larger size
    Case(2, 9, 16, 1, 1, 1, False),  # a refresh for every token
    Case(1, 1, 8, 4, 1, None, False),  # one token
    Case(1, 1, 8, 4, 1, 8, True),
    Case(1, 2, 3, 1, 1, 64, True),
    Case(1, 20, 4, 300, 2, 6, False),  # 600 slots
    Case(5, 37, 19, 3, 2, None, True, documents=PACKED),
    Case(5, 37, 19, 3, 2, 4, False, documents=PACKED),
    Case(2, 700, 24, 5, 1, 16, True, documents=((0, 100, 103, 590),)),  # tokens that feed no block: a document's last
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_the_reference(case: Case) -> None:
    tensors = case.tensors()
    assert_float32_close(layer(kernels, case, *tensors), exact(case, *tensors))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(4, 70),
    experts=st.integers(1, 7),
    slots=st.integers(1, 3),
    block_length=st.one_of(st.none(), st.integers(1, 80)),
    mix_normalized=st.booleans(),
    documents=st.one_of(
        st.none(), st.lists(st.lists(st.integers(0, 69)).map(tuple), min_size=1, max_size=3).map(tuple)
    ),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_the_reference(seed: int, **shape: Any) -> None:
    case = Case(**shape)
    tensors = case.tensors(seed)
    assert_float32_close(layer(kernels, case, *tensors), exact(case, *tensors), 5e-5)


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, BlockPlan]:
    """A length and any blocks that the kernels allow: with gaps, empty ones, and rows that differ."""
    length, rows = draw(st.integers(1, 50)), draw(st.integers(1, 2))
    blocks = draw(st.integers(1, 8))
    starts, ends, readers = [], [], []
    for _ in range(rows):
        start, end = 0, 0
        for k in range(blocks):
            if k == 0 or draw(st.booleans()):  # another document, somewhere behind the block before
                start = end = draw(st.integers(end, length))
            end = draw(st.integers(end, length))
            starts.append(start)
            ends.append(end)
        readers.append(sorted(draw(st.lists(st.integers(0, blocks - 1), min_size=length, max_size=length))))
    shape = (rows, blocks)
    return length, BlockPlan(torch.tensor(starts).view(shape), torch.tensor(ends).view(shape), torch.tensor(readers))


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(planned=plans(), slots=st.integers(1, 9), mix_normalized=st.booleans(), seed=st.integers(0, 2**31))
def test_any_plan_is_the_reference(planned: tuple[int, BlockPlan], slots: int, mix_normalized: bool, seed: int) -> None:
    length, plan = planned
    tensors = Case(2, length, 11, slots, 1, None, mix_normalized).tensors(seed)
    ours = planned_layer(kernels, plan, mix_normalized, *tensors)
    right = planned_layer(reference, plan, mix_normalized, *(tensor.double() for tensor in tensors))
    assert_float32_close(ours, right, 5e-5)


def test_empty_blocks_are_zero_and_have_no_gradient() -> None:
    x, keys = Case(1, 6, 4, 3, 1, None, False).tensors()
    leaves = [tensor.requires_grad_() for tensor in (x, keys)]
    starts, ends = torch.tensor([[2, 2, 2, 6]]), torch.tensor([[2, 4, 4, 6]])  # the first and the last are empty
    slots, _, lse = kernels.dispatch(*leaves, starts, ends, True)
    assert (slots[0, [0, 3]] == 0).all() and lse[0, [0, 3]].isneginf().all()
    assert torch.equal(slots[0, 1], slots[0, 2]) and torch.equal(lse[0, 1], lse[0, 2])
    grad_x, grad_keys = torch.autograd.grad((slots[0, [0, 3]].sum(), lse[0, [0, 3]].sum()), leaves, retain_graph=True)
    assert not grad_x.any() and not grad_keys.any()
    grad_x, grad_keys = torch.autograd.grad((slots.sum(), lse.sum()), leaves)
    assert grad_x.isfinite().all() and grad_keys.isfinite().all() and grad_x[0, 2:4].any()
    assert not grad_x[0, [0, 1, 4, 5]].any()


def test_parts_of_a_sequence_merge_by_their_log_sum_exp() -> None:
    """What sequence parallelism does: slots of parts, weighted by exp(lse); the gradients go through both."""
    x, keys = Case(2, 20, 9, 4, 1, None, False).tensors()

    def slots_of(parts: list[int]) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_(), keys.clone().requires_grad_()]
        bounds = torch.tensor([[0, *parts, 20]])
        slots, _, lse = kernels.dispatch(*leaves, bounds[:, :-1].contiguous(), bounds[:, 1:].contiguous(), False)
        merged = (lse.softmax(1).unsqueeze(-1) * slots).sum(1)
        return (merged, *torch.autograd.grad(merged.cos().sum(), leaves))

    for ours, right in zip(slots_of([3, 11, 11]), slots_of([]), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    mode=st.sampled_from(["sequence", "block_causal", "token"]),
    mix=st.sampled_from(["normalized", "raw"]),
    block_length=st.integers(1, 9),
    documents=st.lists(st.lists(st.integers(1, 29)).map(tuple), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_each_document_is_as_if_alone(
    mode: str, mix: str, block_length: int, documents: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    case = Case(2, 30, 7, 3, 2, None, True, documents=tuple(documents))
    generator = torch.Generator().manual_seed(0)
    x, phi = torch.randn(2, 30, 7, generator=generator).to(dtype), torch.randn(7, 3, 2, generator=generator).to(dtype)
    scale = torch.tensor([2.0], dtype=dtype)

    def through(tokens: torch.Tensor, document_starts: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (tokens, phi, scale)]
        slots, routing = dispatch(*leaves, mode, mix, block_length, document_starts)
        y = combine(torch.tanh(slots), routing)
        return (y, *torch.autograd.grad(y.sin().sum(), leaves))

    document_starts = case.document_starts()
    together = through(x, document_starts)
    alone = [torch.zeros_like(value) for value in together]
    for b in range(2):
        edges = [*document_starts[b].unique().tolist(), 30]
        for start, end in pairwise(edges):
            y, grad_x, grad_phi, grad_scale = through(x[b : b + 1, start:end], None)
            alone[0][b, start:end], alone[1][b, start:end] = y[0], grad_x[0]
            alone[2] += grad_phi
            alone[3] += grad_scale
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [None, 16])
@pytest.mark.parametrize("mix_normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_are_no_worse_than_eager(
    block_length: int | None, mix_normalized: bool, dtype: torch.dtype
) -> None:
    case = Case(2, 200, 96, 6, 1, block_length, mix_normalized, dtype=dtype)
    tensors = case.tensors()
    right = exact(case, *tensors)
    ours, eager = (layer(module, case, *tensors) for module in (kernels, reference))
    for name in NAMES:
        assert ours[name].dtype == eager[name].dtype
        error, eager_error = ((result[name].double() - right[name]).norm().item() for result in (ours, eager))
        floor = 1e-6 * right[name].norm().item()  # of what is float32 in both
        assert error <= 1.02 * eager_error + floor, f"{name}: {error:.2e}, eager {eager_error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_read_and_rounded_exactly(dtype: torch.dtype) -> None:
    """All that there are, and means of two, which are rounded to nearest even; in vectors, and in what is left over."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    subnormal = every.float().abs() < torch.finfo(dtype).smallest_normal
    every = every[every.isfinite() & ~(subnormal & (dtype == torch.bfloat16))]  # AVX512-BF16 takes these for 0
    others = every.roll(3)
    for width in (len(every), 7):
        rows = torch.stack((every[-width:], others[-width:]))
        block = torch.tensor([[0]]), torch.tensor([[1]]), False
        slots, _, _ = torch.ops.steel_megatron.soft_moe_dispatch(rows[None, :1], torch.zeros(width, 1), *block)
        assert torch.equal(slots[0, 0, 0], rows[0].float())
        mean = kernels.combine(rows[None, None], torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64))[0, 0]
        right = rows.double().mean(0).to(dtype)
        assert torch.equal(mean, right), (mean != right).sum()


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_huge_logits_and_equal_tokens(block_length: int | None, mix_normalized: bool) -> None:
    case = Case(2, 23, 12, 3, 1, block_length, mix_normalized, scale=1e3)
    x, keys = case.tensors()
    x[:, 7:15] = x[:, 7:8]
    # A logit of 1e3 is only known to 1e-4 in float32, and its exponential no better.
    assert_float32_close(layer(kernels, case, x, keys), exact(case, x, keys), 1e-3)
    huge = layer(kernels, case, x, keys * 1e27)
    assert all(value.isfinite().all() for value in huge.values())


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_zero_vectors(block_length: int | None, mix_normalized: bool) -> None:
    case = Case(2, 23, 12, 3, 1, block_length, mix_normalized)
    x, keys = case.tensors()
    x[:, [0, 5, 22]] = 0.0
    ours, right = layer(kernels, case, x, keys), exact(case, x, keys)
    zero = (x == 0).all(-1)
    assert right["grad x"][zero].abs().max() > 1e9  # the gradient of x / 1e-12, as autograd has it
    torch.testing.assert_close(ours["grad x"][zero].double(), right["grad x"][zero], rtol=1e-3, atol=1e6)
    for result in (ours, right):
        result["grad x"] = result["grad x"].masked_fill(zero.unsqueeze(-1), 0.0)
    assert_float32_close(ours, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(1, 1100, 48, 6, 1, None, True), Case(2, 700, 48, 5, 2, 16, False)], ids=str)
def test_threads_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    x, keys = case.tensors()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer(kernels, case, x.to(dtype), keys))
    finally:
        torch.set_num_threads(threads)
    for name in ("slots", "logits", "lse", "y", "grad x"):
        assert torch.equal(results[0][name], results[1][name]) and torch.equal(results[0][name], results[2][name]), name


def test_threads_do_not_change_the_gradient_of_keys() -> None:
    case = Case(2, 1100, 48, 6, 1, 64, True, documents=((0, 300), (0, 1, 777)))
    (x, keys), plan = case.tensors(), case.plan()
    slots, logits, lse = kernels.dispatch(x, keys, plan.starts, plan.ends, True)
    gradients = (torch.cos(slots), torch.cos(logits), torch.ones_like(lse))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                torch.ops.steel_megatron.soft_moe_dispatch_backward(
                    *gradients, x, keys, plan.starts, plan.ends, True, slots, logits, lse
                )[1]
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [4, 40])
@pytest.mark.parametrize(("length", "documents"), [(300, ()), (33, ()), (300, (7, 8, 120, 170))])
def test_later_tokens_do_not_change_a_bit(
    length: int, documents: tuple[int, ...], experts: int, dtype: torch.dtype
) -> None:
    case = Case(1, length, 20, experts, 1, None, False, documents=(documents,))
    (x, _), cut = case.tensors(), length // 2
    phi = torch.randn(20, experts, 1, generator=torch.Generator().manual_seed(2))
    starts, changed = case.document_starts(), x.clone()
    assert starts is not None
    changed[:, cut:] *= -50
    results = []
    for tokens in (x, changed, x[:, :cut]):
        size = tokens.size(1)
        slots, routing = dispatch(
            tokens.to(dtype), phi, torch.tensor([3.0]), "block_causal", "raw", 8, starts[:, :size].contiguous()
        )
        results.append(combine(torch.tanh(slots), routing)[:, :cut])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_earlier_document_does_not_change_a_bit() -> None:
    case = Case(1, 90, 20, 4, 1, 8, False, documents=((0, 31, 60),))
    x, keys = case.tensors()
    changed = x.clone()
    changed[:, :31] *= -50
    ours, after = (layer(kernels, case, tokens, keys) for tokens in (x, changed))
    assert torch.equal(ours["y"][:, 31:], after["y"][:, 31:])
    assert torch.equal(ours["grad x"][:, 31:], after["grad x"][:, 31:])
    assert not torch.equal(ours["y"][:, :31], after["y"][:, :31])


def test_strided_inputs() -> None:
    case = Case(2, 30, 16, 3, 2, 7, False)
    x, keys = case.tensors()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)  # as the model hands it over: [T, B, d] in memory
    assert not strided.is_contiguous()
    ours, right = layer(kernels, case, strided, keys), layer(kernels, case, x, keys)
    assert all(torch.equal(ours[name], right[name]) for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", kernels.TYPES)
@pytest.mark.parametrize(("block_length", "documents"), [(None, None), (4, None), (4, ((0, 3), (0, 1, 9)))])
def test_torch_accepts_the_operators(
    dtype: torch.dtype, block_length: int | None, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    case = Case(2, 11, 8, 3, 1, block_length, True, documents=documents)
    (x, keys), plan = case.tensors(), case.plan()
    operators = torch.ops.steel_megatron
    x = x.to(dtype).requires_grad_()
    blocks = (plan.starts, plan.ends, True)
    torch.library.opcheck(operators.soft_moe_dispatch, (x, keys.detach().requires_grad_(), *blocks))
    slots, logits, lse = operators.soft_moe_dispatch(x.detach(), keys, *blocks)
    outputs = slots.to(dtype, copy=True).requires_grad_()
    torch.library.opcheck(operators.soft_moe_combine, (outputs, logits.requires_grad_(), plan.block_of_token))
    logits, outputs, x = logits.detach(), outputs.detach(), x.detach()
    torch.library.opcheck(
        operators.soft_moe_dispatch_backward, (slots, logits, lse, x, keys, *blocks, slots, logits, lse)
    )
    torch.library.opcheck(operators.soft_moe_combine_backward, (x, outputs, logits, plan.block_of_token))


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 5, 4, requires_grad=True)
    keys, plan = torch.randn(4, 2), block_plan(5, None, torch.device("cpu"))
    slots, logits, lse = kernels.dispatch(x, keys, plan.starts, plan.ends, True)
    for value in (slots, lse, kernels.combine(slots, logits, plan.block_of_token)):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, dtype=torch.float64)}, "Double"),
        ({"x": torch.zeros(5, 4)}, r"\[5, 4\]"),
        ({"keys": torch.zeros(3, 2)}, r"\[3, 2\]"),
        ({"ends": torch.tensor([[2, 1]])}, "ends = 1"),  # descends
        ({"ends": torch.tensor([[2, 6]])}, "ends = 6"),  # past the sequence
        ({"starts": torch.tensor([[-1, -1]])}, "starts = -1"),
        (
            {"starts": torch.tensor([[0, 1]])},
            "block 1 of row 0",
        ),  # overlaps the block before, which it does not go on from
        ({"starts": torch.tensor([[3, 3]])}, "block 0 of row 0"),  # ends before it starts
        ({"starts": torch.zeros(3, 2, dtype=torch.int64)}, r"\[3, 2\]"),
        ({"starts": torch.zeros(1, 1, dtype=torch.int64)}, r"\[1, 2\]"),
        ({"ends": torch.tensor([[2, 5]], dtype=torch.int32)}, "Int"),
    ],
    ids=str,
)
def test_bad_dispatch_arguments_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "x": torch.ones(2, 5, 4),
        "keys": torch.ones(4, 2),
        "starts": torch.tensor([[0, 0]]),
        "ends": torch.tensor([[2, 5]]),
    }
    kernels.dispatch(**good, mix_normalized=True)
    with pytest.raises(RuntimeError, match=message):
        kernels.dispatch(**{**good, **change}, mix_normalized=True)


@pytest.mark.parametrize("blocks", [[[0, 1, 0]], [[0, 1, 2]], [[-1, 0, 1]], [[0, 1]], [0, 1, 1], [[0, 0, 0]] * 3])
def test_bad_blocks_are_refused(blocks: list[list[int]]) -> None:
    with pytest.raises(RuntimeError, match="block_of_token"):
        kernels.combine(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 3), torch.tensor(blocks))


def test_sizes_that_overflow_are_refused() -> None:
    """Tensors of one number, expanded: nothing is allocated before the check."""
    starts, ends = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    x, keys = torch.zeros(1, 1, 1).expand(2**20, 2**20, 2**20), torch.zeros(1, 1).expand(2**20, 2**20)
    with pytest.raises(RuntimeError, match=r"more than memory can be addressed for|overflow"):
        kernels.dispatch(x, keys, starts, ends, True)


def test_an_empty_batch_and_nan() -> None:
    starts, ends = torch.tensor([[0]]), torch.tensor([[5]])
    slots, logits, _ = kernels.dispatch(torch.ones(0, 5, 4), torch.ones(4, 2), starts, ends, False)
    assert slots.shape == (0, 1, 2, 4) and logits.shape == (0, 5, 2)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 5, 4)
        x[0, 3] = bad
        slots, logits, lse = kernels.dispatch(x, torch.ones(4, 2), starts, ends, False)
        assert slots.isnan().all() and logits[0, 3].isnan().all() and lse.isnan().all()
        assert kernels.combine(slots, logits, torch.zeros(1, 5, dtype=torch.int64)).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_narrower_vectors_compute_the_same(capability: str) -> None:
    """What machines with less than this one run: the variable is read once, so in a process of its own."""
    root = Path(__file__).resolve().parents[2]
    check = "import torch\nfrom tests.ops import test_kernels as t\nassert t.kernels.available()\n"
    check += "for case in t.CASES: t.test_float32_is_the_reference(case)\n"
    check += "for dtype in t.kernels.TYPES[1:]: t.test_16_bit_numbers_are_read_and_rounded_exactly(dtype)\n"
    run = subprocess.run(
        [sys.executable, "-c", check + "t.test_16_bit_types_are_no_worse_than_eager(16, True, torch.bfloat16)"],
        cwd=root,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
