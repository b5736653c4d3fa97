"""Mode ``merged``: experts merged per segment, in bounded memory, equal to merging them one by one in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from steel_megatron.config import ParallelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.model.routing.merging import CHUNK_BYTES, merged_linear, sums_are_sent
from steel_megatron.ops import merge_weights
from steel_megatron.ops.plan import segment_plan
from tests.distributed import run_distributed
from tests.train.small_run import compare, small_run, train

F64 = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def random_shares(segments: int, experts: int, seed: int = 1) -> torch.Tensor:
    return random(segments, experts, seed=seed).softmax(-1)


def linear_one_by_one(x: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What :func:`merged_linear` must be: for each segment, add the experts up, then multiply."""
    results = []
    for tokens, parts in zip(x, shares, strict=True):
        matrix = sum(part * expert for part, expert in zip(parts, weight, strict=True))
        results.append(F.linear(tokens, matrix))
    return torch.stack(results)


def expert_one_by_one(x: torch.Tensor, shares: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What :func:`merged_experts` must be."""
    gate, value = (linear_one_by_one(x, shares, up[:, k]) for k in (0, 1))
    out = [linear_one_by_one(F.silu(gate) * value, shares, down[:, k]) for k in range(down.size(1))]
    return out[0] if len(out) == 1 else F.silu(out[0]) * out[1]


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, random(*y.shape, seed=9, dtype=y.dtype))


@settings(deadline=None, max_examples=40)
@given(
    segments=st.integers(1, 7),
    tokens=st.integers(1, 5),
    experts=st.integers(1, 4),
    at_once=st.integers(0, 8),
    width=st.integers(1, 6),
)
def test_one_linear_map_equals_merging_one_by_one(
    segments: int, tokens: int, experts: int, at_once: int, width: int
) -> None:
    inputs = leaves(random(segments, tokens, 3), random_shares(segments, experts), random(experts, width, 3, seed=2))
    x, shares, weight = inputs
    ours = merged_linear(x, shares.unsqueeze(0), weight, chunk_bytes=at_once * width * 3 * 8)
    theirs = linear_one_by_one(x, shares, weight)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    inputs = leaves(random(3, 2, 4), random_shares(3, 2), random(2, 5, 4, seed=2))

    def linear(x: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return merged_linear(x, shares.unsqueeze(0), weight, chunk_bytes=2 * 5 * 4 * 8)

    assert torch.autograd.gradcheck(linear, inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    inputs = leaves(random(3, 2, 4), random_shares(3, 2), random(2, 5, 4, seed=2))
    theirs = gradients(linear_one_by_one(*inputs), *inputs)
    inputs[frozen].requires_grad_(False)
    x, shares, weight = inputs
    merged_linear(x, shares.unsqueeze(0), weight, chunk_bytes=1).backward(random(3, 2, 5, seed=9))
    for number, (tensor, expected) in enumerate(zip(inputs, theirs, strict=True)):
        if number == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.slow
def test_chunks_do_not_change_the_result() -> None:
    inputs = leaves(random(37, 8, 16), random_shares(37, 6), random(6, 24, 16, seed=2))
    inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    x, shares, weight = inputs
    results = []
    for at_once in (1, 5, 37):
        y = merged_linear(x, shares.unsqueeze(0), weight, chunk_bytes=at_once * 24 * 16 * 4)
        results.append((y, *gradients(y, *inputs)))
    for other in results[:-1]:
        for a, b in zip(other, results[-1], strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.slow
def test_bfloat16_errs_no_more_than_merging_one_by_one() -> None:
    exact = leaves(random(24, 16, 32) / 6, random_shares(24, 6), random(6, 48, 32, seed=2) / 6)
    rounded = [exact[0].bfloat16(), exact[1].float(), exact[2].bfloat16()]
    exact = leaves(*(tensor.double() for tensor in rounded))
    y = linear_one_by_one(*exact)
    truth = (y, *gradients(y, *exact))

    def errors(results: tuple[torch.Tensor, ...]) -> list[float]:
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, truth, strict=True)]

    inputs = leaves(*rounded)
    y = merged_linear(inputs[0], inputs[1].unsqueeze(0), inputs[2], chunk_bytes=5 * 48 * 32 * 2)
    ours = (y, *gradients(y, *inputs))
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    inputs = leaves(*rounded)
    plain = torch.bmm(inputs[0], torch.einsum("me,eoi->moi", inputs[1].bfloat16(), inputs[2]).mT)
    for mine, theirs in zip(errors(ours), errors((plain, *gradients(plain, *inputs))), strict=True):
        assert mine < 1.1 * theirs and mine < 5e-3


class LargestTensor(TorchDispatchMode):
    """The largest piece of memory that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.slow
def test_memory_is_bounded_and_nothing_merged_is_kept() -> None:
    segments, matrix = 64, 24 * 16 * 8
    inputs = leaves(random(segments, 2, 16), random_shares(segments, 3), random(3, 24, 16, seed=2))
    x, shares, weight = inputs
    kept: list[int] = []

    def measured(call: Any) -> int:
        kept.clear()
        with (
            LargestTensor() as largest,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: kept.append(tensor.untyped_storage().nbytes()) or tensor, lambda tensor: tensor
            ),
        ):
            gradients(call(), *inputs)
        return largest.bytes

    budget = 4 * matrix
    largest_activation = segments * 2 * 24 * 8
    ours = measured(lambda: merged_linear(x, shares.unsqueeze(0), weight, chunk_bytes=budget))
    assert ours == max(budget, largest_activation)
    assert sum(kept) == sum(tensor.numel() * 8 for tensor in inputs)
    plain = measured(lambda: torch.bmm(x, torch.einsum("me,eoi->moi", shares, weight).mT))
    assert plain == segments * matrix and max(kept) == plain


def test_memory_at_the_size_of_steel_llm() -> None:
    # 4 sequences of 2,048 tokens in segments of 64, on a device that computes nothing.
    shapes = ((128, 64, 1792), (1, 128, 6), (6, 3584, 1792))
    x, shares, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    shares = shares.float()
    inputs = [tensor.requires_grad_() for tensor in (x, shares, weight)]
    with LargestTensor() as largest:
        y = merged_linear(*inputs)
        torch.autograd.grad(y, inputs, torch.empty_like(y))
    all_at_once = 128 * 2 * weight[0].numel()
    assert largest.bytes <= CHUNK_BYTES < all_at_once / 6


# --- several processes ---------------------------------------------------------------------------------------------

WIDTH, INNER, EXPERTS, TOKENS = 6, 4, 8, 3
LAYOUTS = {
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "ep2": (ParallelConfig(expert_model_parallel_size=2), 2),
    "tp2 ep2": (ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4),
    "ep4": (ParallelConfig(expert_model_parallel_size=4), 4),
}


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this process sends by each collective of torch.distributed, on the way of the least."""
    import torch.distributed as dist

    sent: dict[str, int] = {}
    originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor",
                                                        "all_to_all_single", "all_reduce")}  # fmt: skip

    def counting(name: str) -> Any:
        def call(*args: torch.Tensor, **kwargs: Any) -> Any:
            whole = max(tensor.numel() * tensor.element_size() for tensor in args[:2] if torch.is_tensor(tensor))
            ranks = kwargs["group"].size()
            times = 2 if name == "all_reduce" else 1
            sent[name] = sent.get(name, 0) + times * whole * (ranks - 1) // ranks
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def layer_inputs(group: int, segments: int, matrices: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    """Tokens and shares of one data-parallel process, and all experts' whole weights."""
    return [
        random(segments, TOKENS, WIDTH, seed=10 + group, dtype=dtype),
        random_shares(segments, EXPERTS, seed=20 + group).to(torch.promote_types(dtype, torch.float32)),
        random(EXPERTS, 2, INNER, WIDTH, seed=30, dtype=dtype),
        random(EXPERTS, matrices, WIDTH, INNER, seed=31, dtype=dtype),
    ]


def run_layer(
    parallel: ParallelConfig, segments: list[int], matrices: int, equal: bool, dtype: torch.dtype = F64
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The layer on this process: where it is, what it sent, and its result and gradients."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(parallel)
    from steel_megatron.model.experts import merged_experts

    groups, place = topology.groups, topology.data_parallel_rank
    x, shares, up, down = layer_inputs(place, segments[place], matrices, dtype)
    part = slice(groups.tp.rank() * INNER // groups.tp.size(), (groups.tp.rank() + 1) * INNER // groups.tp.size())
    mine = slice(groups.ep.rank() * EXPERTS // groups.ep.size(), (groups.ep.rank() + 1) * EXPERTS // groups.ep.size())
    inputs = leaves(x, shares, up[mine, :, part], down[mine, :, :, part])
    bound = 2 * 2 * INNER * WIDTH * 8 // groups.tp.size()  # one or two segments at once
    with counted_bytes() as sent:
        y = merged_experts(
            *inputs,
            tp_group=groups.tp,
            ep_group=groups.ep if groups.ep.size() > 1 else None,
            equal_segments=equal,
            chunk_bytes=bound,
        )
        results = [y, *gradients(y, *inputs)]
    return {"data": place, "experts": mine, "inner": part, "sent": sent}, [t.detach() for t in results]


def compare_layer(layout: str, segments: list[int], matrices: int, equal: bool) -> dict[str, int]:
    """Hold every process to all sequences in one process, in float64.

    Returns:
        bytes sent by rank 0.
    """
    parallel, processes = LAYOUTS[layout]
    whole = [leaves(*layer_inputs(place, count, matrices)) for place, count in enumerate(segments)]
    for inputs in whole[1:]:
        inputs[2:] = whole[0][2:]
    ys = [expert_one_by_one(*inputs) for inputs in whole]
    up, down = whole[0][2:]
    loss = sum((y * random(*y.shape, seed=9)).sum() for y in ys)
    loss.backward()
    answers = run_distributed(run_layer, processes, parallel, segments, matrices, equal)
    for place, (y, grad_x, grad_shares, grad_up, grad_down) in answers:
        data, experts, inner = (place[name] for name in ("data", "experts", "inner"))
        torch.testing.assert_close(y, ys[data].detach())
        torch.testing.assert_close(grad_x, whole[data][0].grad)
        torch.testing.assert_close(grad_shares, whole[data][1].grad)
        torch.testing.assert_close(grad_up, up.grad[experts, :, inner])
        torch.testing.assert_close(grad_down, down.grad[experts, :, :, inner])
    return answers[0][0]["sent"]


@pytest.mark.slow
@pytest.mark.parametrize("matrices", [1, 2], ids=["swiglu", "double swiglu"])
def test_tensor_parallel_equals_one_process(matrices: int) -> None:
    sent = compare_layer("tp2", [5], matrices, equal=True)
    tokens, shares = 5 * TOKENS * WIDTH * 8, 5 * EXPERTS * 8
    assert sent == {"all_reduce": matrices * tokens + tokens + shares}  # results; gradients of tokens and shares


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2", "tp2 ep2", "ep4"])
@pytest.mark.parametrize("few", [True, False], ids=["few segments", "many segments"])
def test_expert_parallel_equals_one_process_and_sends_the_lesser_bytes(layout: str, few: bool) -> None:
    parallel, _ = LAYOUTS[layout]
    ranks = parallel.expert_model_parallel_size
    segments = EXPERTS // ranks - 1 if few else 5
    sent = compare_layer(layout, [segments] * ranks, 2, equal=True)
    sent.pop("all_reduce", 0)  # of tensor parallelism
    numbers = 4 * INNER * WIDTH // parallel.tensor_model_parallel_size
    if few:  # R * M < E: every process sums its experts for all
        assert sums_are_sent(segments, EXPERTS, ranks)
        matrices = 8 * (ranks - 1) * segments * numbers
        shares = 8 * (ranks - 1) * segments * EXPERTS // ranks
        assert sent == {
            "all_to_all_single": 2 * shares,
            "reduce_scatter_tensor": 2 * matrices,  # forward, and again in the backward pass
            "all_gather_into_tensor": matrices,  # of the gradient
        }
    else:
        assert not sums_are_sent(segments, EXPERTS, ranks)
        experts = 8 * EXPERTS * numbers * (ranks - 1) // ranks
        assert sent == {"all_gather_into_tensor": 2 * experts, "reduce_scatter_tensor": experts}


def test_processes_with_unequal_numbers_of_segments() -> None:
    compare_layer("ep2", [1, 4], 2, equal=False)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [1, 5])
def test_bfloat16_experts_on_two_processes(segments: int) -> None:
    parallel, processes = LAYOUTS["ep2"]
    narrow = run_distributed(run_layer, processes, parallel, [segments] * 2, 2, True, torch.bfloat16)
    wide = run_distributed(run_layer, processes, parallel, [segments] * 2, 2, True, F64)
    for (_, ours), (_, theirs) in zip(narrow, wide, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.double() - b).norm() < 0.05 * b.norm()


MERGED: dict[str, Any] = {"routing_mode": "merged", "slots_per_expert": 1, "num_experts": 8}
# By the length of a segment, with 2 sequences of 24 tokens per micro batch: 6 or 2 segments on each process.
SEGMENTS = {"experts travel": 8, "sums travel": 24}


@cache
def trained_alone(block_length: int) -> list[tuple[float, float]]:
    run = small_run(ParallelConfig(), steps=3, block_length=block_length, **MERGED)
    return run_distributed(train, 1, run)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("layout", ["ep2", "tp2 ep2"])
def test_training_equals_one_process(layout: str, case: str) -> None:
    parallel, processes = LAYOUTS[layout]
    assert sums_are_sent(2 * 24 // SEGMENTS[case], 8, 2) == (case == "sums travel")
    run = small_run(parallel, steps=3, block_length=SEGMENTS[case], **MERGED)
    compare(run_distributed(train, processes, run), trained_alone(SEGMENTS[case]))


# --- documents -----------------------------------------------------------------------------------------------------


def starts_of(lengths: list[list[int]]) -> torch.Tensor:
    """``document_starts`` of rows of documents with these lengths."""
    rows = []
    for row in lengths:
        starts = [sum(row[:number]) for number in range(len(row))]
        rows.append([start for start, length in zip(starts, row, strict=True) for _ in range(length)])
    return torch.tensor(rows)


def shares_of_document(
    tokens: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, block_length: int
) -> list[torch.Tensor]:
    """The shares of each segment of one document [T, d], as the formulas say it."""
    mixed = tokens / tokens.norm(dim=-1, keepdim=True) if mix == "normalized" else tokens
    shares = []
    for start in range(0, len(tokens), block_length):
        vector = mixed[start - block_length : start].mean(0) if start else mixed[0]
        logits = torch.einsum("d,dep->ep", vector / vector.norm(), phi / phi.norm(dim=0)) * scale
        shares.append(logits.flatten().softmax(0).view_as(logits).sum(-1))
    return shares


PACKED = [[[7]], [[1, 6]], [[3, 1, 3], [7]], [[4, 3], [3, 4], [1, 6]], [[1] * 7, [2, 5]], [[7], [1, 1, 5]]]


@pytest.mark.parametrize("documents", PACKED, ids=str)
@pytest.mark.parametrize("block_length", [1, 3, 100])
@pytest.mark.parametrize("mix", ["raw", "normalized"])
def test_each_document_is_routed_alone(documents: list[list[int]], block_length: int, mix: str) -> None:
    inputs = leaves(random(len(documents), 7, 4), random(4, 3, 2, seed=1), torch.tensor([3.0], dtype=F64))
    x, phi, scale = inputs
    shares = merge_weights(x, phi, scale, mix=mix, block_length=block_length, document_starts=starts_of(documents))
    expected = []
    for row, lengths in zip(x, documents, strict=True):
        parts = [shares_of_document(t, phi, scale, mix, block_length) for t in row.split(lengths)]
        expected.append(torch.stack([segment for part in parts for segment in part]))
    most = max(len(row) for row in expected)
    theirs = torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in expected])
    torch.testing.assert_close(shares, theirs)
    for a, b in zip(gradients(shares, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_one_document_needs_no_plan() -> None:
    x, phi, scale = random(2, 7, 4), random(4, 3, 2, seed=1), torch.tensor([3.0], dtype=F64)
    plain = merge_weights(x, phi, scale, mix="raw", block_length=3)
    starts = torch.zeros(2, 7, dtype=torch.int64)
    torch.testing.assert_close(merge_weights(x, phi, scale, mix="raw", block_length=3, document_starts=starts), plain)


def test_plan_of_segments() -> None:
    plan = segment_plan(starts_of([[5, 2], [7]]), block_length=3)
    assert plan.starts.tolist() == [[0, 3, 5], [0, 3, 6]]
    assert plan.lengths.tolist() == [[3, 2, 2], [3, 3, 1]]
    assert plan.follows.tolist() == [[False, True, False], [False, True, True]]
    assert (plan.total, plan.longest) == (6, 3)
    plan = segment_plan(starts_of([[4], [2, 2]]), block_length=9)
    assert plan.lengths.tolist() == [[4, 0], [2, 2]]
    assert plan.real.tolist() == [[True, False], [True, True]]
    assert (plan.total, plan.longest) == (3, 4)
    assert plan.place_of_token.tolist() == [[0, 1, 2, 3], [4, 5, 8, 9]]


def through_segments(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    document_starts: torch.Tensor,
) -> torch.Tensor:
    """[B, T, d] to [B, T, d]: route, gather segments, merge, put back."""
    plan = segment_plan(document_starts, 2)
    shares = merge_weights(x, phi, scale, mix="raw", block_length=2, document_starts=document_starts)[plan.real]
    return plan.from_segments(torch.tanh(merged_linear(plan.to_segments(x), shares.unsqueeze(0), weight)))


def test_packed_documents_equal_documents_alone_and_do_not_see_each_other() -> None:
    x, phi, scale = random(2, 7, 4), random(4, 3, 1, seed=1), torch.tensor([3.0], dtype=F64)
    weight = random(3, 4, 4, seed=2)
    documents = [[5, 2], [1, 6]]
    together = through_segments(x, phi, scale, weight, starts_of(documents))
    for row, result, lengths in zip(x, together, documents, strict=True):
        for document, part in zip(row.split(lengths), result.split(lengths), strict=True):
            alone = through_segments(document[None], phi, scale, weight, starts_of([[len(document)]]))[0]
            torch.testing.assert_close(part, alone)
    changed = x.clone()
    changed[0, 5:], changed[1, :1] = -3 * x[0, 5:], 7.0
    after = through_segments(changed, phi, scale, weight, starts_of(documents))
    assert torch.equal(together[0, :5], after[0, :5]) and torch.equal(together[1, 1:], after[1, 1:])
    inputs = leaves(x, phi, scale, weight)
    starts = starts_of(documents)
    assert torch.autograd.gradcheck(lambda *tensors: through_segments(*tensors, starts), inputs, fast_mode=True)


def test_bad_document_starts_are_named() -> None:
    x, phi, scale = random(1, 4, 4), random(4, 3, 1, seed=1), torch.tensor([3.0], dtype=F64)
    wrong = torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(ConfigError, match=r"document_starts\[0, 2\] = 1"):
        merge_weights(x, phi, scale, mix="raw", block_length=2, document_starts=wrong)
