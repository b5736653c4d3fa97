"""Routing of sequences that processes share equals routing of whole sequences: values and all gradients, in float64.

First in one process, which plays all ranks one after another; then on real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.config import ParallelConfig
from steel_megatron.model.routing.segment_split import SplitSegments, merge_weights_split, split_segments
from steel_megatron.model.routing.split import dispatch_split, merge_partials, partial_slots
from steel_megatron.model.routing.split_plan import SplitPlan, split_plan, split_plan_of_one_document
from steel_megatron.ops import Routing, combine, dispatch
from steel_megatron.ops.plan import block_plan, segment_plan
from steel_megatron.ops.soft_moe import merge_weights_of_documents
from steel_megatron.parallel.sequence import SequenceSplit
from tests.distributed import run_distributed

WIDTH, EXPERTS, PER_EXPERT, BATCH = 5, 2, 2, 2
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers: handing them out to threads takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(length: int, scale: float, seed: int = 0) -> Tensors:
    """Tokens, parameters, the experts' weights and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "x": normal(BATCH, length, WIDTH) * 3,
        "phi": normal(WIDTH, EXPERTS, PER_EXPERT),
        "scale": torch.tensor([scale], dtype=torch.float64),
        "weight": normal(EXPERTS, WIDTH, WIDTH),
        "grad": normal(BATCH, length, WIDTH),
    }


def leaves(values: Tensors) -> Tensors:
    return {name: value.clone().requires_grad_(name != "grad") for name, value in values.items()}


def experts(slots: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Something that is not linear, other for each expert."""
    return torch.tanh(torch.einsum("brepd,edc->brepc", slots, weight)) + slots.square()


def whole(values: Tensors, case: dict[str, Any]) -> Tensors:
    """Result and gradients with whole sequences."""
    one = leaves(values)
    slots, routing = dispatch(one["x"], one["phi"], one["scale"], **case)
    y = combine(experts(slots, one["weight"]), routing)
    (y * one["grad"]).sum().backward()
    return {"y": y.detach()} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")}


def plans(case: dict[str, Any], split: SequenceSplit, equal_blocks: bool = False) -> list[SplitPlan]:
    plan = block_plan(split.length, case.get("block_length"), CPU, case.get("document_starts"))
    return [split_plan(plan, split, rank, equal_blocks=equal_blocks) for rank in range(split.ranks)]


def played(values: Tensors, case: dict[str, Any], split: SequenceSplit, equal_blocks: bool) -> Tensors:
    """The same by as many ranks as there are, one after another in this process."""
    one, y = leaves(values), torch.zeros_like(values["x"])
    own = plans(case, split, equal_blocks)
    positions = [split.positions(rank) for rank in range(split.ranks)]
    parts, logits = zip(
        *(
            partial_slots(one["x"][:, place], one["phi"], one["scale"], case["mix"], plan)
            for place, plan in zip(positions, own, strict=True)
        ),
        strict=True,
    )
    rows = torch.arange(BATCH).unsqueeze(1)
    exported = torch.stack([part[rows, plan.sent] for part, plan in zip(parts, own, strict=True)])
    everyones = exported if exported.size(2) else None
    if equal_blocks:
        assert len({plan.own_span.size(1) for plan in own}) == 1
    total = 0.0
    for place, plan, part, logit in zip(positions, own, parts, logits, strict=True):
        slots = merge_partials(part, everyones, plan).unflatten(2, (EXPERTS, PER_EXPERT))
        result = combine(experts(slots, one["weight"]), Routing(logit, plan.block_of_token))
        y[:, place] = result.detach()
        total = total + (result * one["grad"][:, place]).sum()
    total.backward()
    return {"y": y} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")}


def assert_equal(ours: Tensors, theirs: Tensors, tolerance: float = 1e-11) -> None:
    for name, expected in theirs.items():
        assert ours[name].isfinite().all(), name
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def documents(length: int, starts: list[list[int]]) -> torch.Tensor:
    """document_starts of sequences whose documents begin at these tokens, and at 0."""
    rows = []
    for row in starts:
        begins = torch.zeros(length, dtype=torch.int64)
        begins[row] = torch.tensor(row, dtype=torch.int64)
        rows.append(begins.cummax(0).values)
    return torch.stack(rows)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_split_equals_whole_sequences(data: st.DataObject) -> None:
    context, tensor = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1), (1, 4)]))
    length = 2 * context * tensor * data.draw(st.integers(1, 4))
    mode = data.draw(st.sampled_from(["sequence", "block_causal"]))
    case: dict[str, Any] = {"mode": mode, "mix": data.draw(st.sampled_from(["raw", "normalized"]))}
    if mode == "block_causal":
        case["block_length"] = data.draw(st.integers(1, length + 3))
    if data.draw(st.booleans()):
        starts = st.lists(st.integers(1, length - 1), max_size=6, unique=True)
        case["document_starts"] = documents(length, [data.draw(starts) for _ in range(BATCH)])
    values = inputs(length, data.draw(st.sampled_from([0.5, 3.0, 60.0])), data.draw(st.integers(0, 9)))
    split = SequenceSplit(length, context, tensor)
    ours = played(values, case, split, data.draw(st.booleans()))
    assert all(plan.sent.size(1) <= 2 * len(split.ranges[0]) for plan in plans(case, split))
    assert_equal(ours, whole(values, case), 1e-9)


def test_a_rank_whose_tokens_read_only_what_others_hold() -> None:
    """Refreshes at 1, 2, 4, 8, 16 and 20, pieces of 6: the third's only one, at 16, is read in the fourth as well."""
    case = {"mode": "block_causal", "mix": "raw", "block_length": 20}
    split = SequenceSplit(24, 1, 4)
    own = plans(case, split)
    assert (own[2].own_span == own[2].starts.size(1)).all()  # nothing of its own
    values = inputs(24, 2.0)
    assert_equal(played(values, case, split, equal_blocks=True), whole(values, case))


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_logits(scale: float) -> None:
    values = inputs(24, scale)
    for case in ({"mode": "sequence", "mix": "raw"}, {"mode": "block_causal", "mix": "raw", "block_length": 4}):
        assert_equal(played(values, case, SequenceSplit(24, 2), False), whole(values, case), 1e-9)


def test_one_part_is_enough_where_blocks_end_with_pieces() -> None:
    aligned = split_plan_of_one_document(SequenceSplit(48, 2), 0, 4, False, CPU)
    ragged = split_plan_of_one_document(SequenceSplit(48, 2), 0, 5, False, CPU)
    sequence = split_plan_of_one_document(SequenceSplit(48, 2), 0, None, False, CPU)
    assert [plan.sent.size(1) for plan in (aligned, ragged, sequence)] == [2, 4, 2]  # of two pieces


def test_processes_compute_only_what_their_tokens_read() -> None:
    """Refreshes every 4 of 64 tokens, cut in four; doubling at the start gives the first process one more."""
    split = SequenceSplit(64, 1, 4)
    blocks = [plan.own_span.size(1) for plan in plans({"block_length": 4}, split)]
    assert blocks == [5, 4, 4, 4]
    assert [plan.own_span.size(1) for plan in plans({"block_length": 4}, split, equal_blocks=True)] == [5] * 4


CASES: list[dict[str, Any]] = [
    {"mode": "sequence", "mix": "normalized"},
    {"mode": "block_causal", "mix": "raw", "block_length": 2},
    {"mode": "block_causal", "mix": "normalized", "block_length": 7},
    {"mode": "block_causal", "mix": "raw", "block_length": 100},
    {"mode": "block_causal", "mix": "raw", "block_length": 4, "document_starts": documents(24, [[3, 17], [12]])},
    {"mode": "sequence", "mix": "raw", "document_starts": documents(24, [[1, 2, 23], []])},
]


def through_merged(values: Tensors, plan: SplitSegments, gather: Any) -> torch.Tensor:
    """What mode merged computes of a process's tokens, with one matrix for an expert and a plain loop."""
    routing = (values[name] for name in ("x", "phi", "scale"))
    weights = merge_weights_split(*routing, mix="normalized", plan=plan, gather=gather)
    segments = plan.parts.to_segments(values["x"])
    assert len(segments) == len(weights)
    merged = torch.einsum("me,edc->mdc", weights, values["weight"])
    return plan.parts.from_segments(torch.tanh(segments @ merged))


def whole_merged(values: Tensors, starts: torch.Tensor, block_length: int) -> Tensors:
    """The same of whole sequences."""
    one, plan = leaves(values), segment_plan(starts, block_length)
    weights = merge_weights_of_documents(one["x"], one["phi"], one["scale"], "normalized", plan)
    merged = torch.einsum("me,edc->mdc", weights, one["weight"])
    y = plan.from_segments(torch.tanh(plan.to_segments(one["x"]) @ merged))
    (y * one["grad"]).sum().backward()
    return {"y": y.detach()} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")}


def played_merged(values: Tensors, starts: torch.Tensor, block_length: int, split: SequenceSplit) -> Tensors:
    """The same by as many ranks as there are, one after another in this process."""
    one, y = leaves(values), torch.zeros_like(values["x"])
    own = [split_segments(starts, block_length, split, rank) for rank in range(split.ranks)]
    assert len({(plan.parts.total, plan.parts.longest) for plan in own}) == 1  # tensor-parallel processes gather them
    places = [split.positions(rank) for rank in range(split.ranks)]
    of_rank = [{**one, "x": one["x"][:, place]} for place in places]
    sent: list[torch.Tensor] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        sent.append(part)
        return torch.zeros(split.ranks, *part.shape, dtype=part.dtype)

    for rank_values, plan in zip(of_rank, own, strict=True):
        through_merged(rank_values, plan, keep)
    assert len(sent) in (0, split.ranks)
    assert all(part.size(1) <= 2 * len(split.ranges[0]) for part in sent)
    total = 0.0
    for place, rank_values, plan in zip(places, of_rank, own, strict=True):
        result = through_merged(rank_values, plan, lambda _: torch.stack(sent))
        y[:, place] = result.detach()
        total = total + (result * one["grad"][:, place]).sum()
    total.backward()
    return {"y": y} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_split_of_segments_equals_whole_sequences(data: st.DataObject) -> None:
    context, tensor = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1), (1, 4)]))
    length = 2 * context * tensor * data.draw(st.integers(1, 4))
    begins = st.lists(st.integers(1, length - 1), max_size=6, unique=True)
    starts = documents(length, [data.draw(begins) for _ in range(BATCH)])
    block_length = data.draw(st.integers(1, length + 3))
    values = inputs(length, data.draw(st.sampled_from([0.5, 3.0])), data.draw(st.integers(0, 9)))
    ours = played_merged(values, starts, block_length, SequenceSplit(length, context, tensor))
    assert_equal(ours, whole_merged(values, starts, block_length), 1e-9)


MERGED_CASES = [
    (documents(24, [[], []]), 3),
    (documents(24, [[], []]), 5),
    (documents(24, [[1, 2, 17], [12]]), 4),
    (documents(24, [[10], []]), 100),
]


def on_processes(parallel: ParallelConfig, length: int) -> tuple[list[Tensors], torch.Tensor]:
    """Every case on this process's tokens; its results and gradients, and its positions."""
    from steel_megatron.parallel.topology import initialize

    groups = initialize(parallel).groups
    split = SequenceSplit(length, parallel.context_parallel_size, parallel.sequence_parallel_size)
    from steel_megatron.parallel.collectives import gather_parts

    group, results = groups.tp_cp, []
    gather = partial(gather_parts, group=group)
    place = split.positions(group.rank())
    for case in CASES:
        one = leaves({**inputs(length, 2.0), "x": inputs(length, 2.0)["x"][:, place]})
        plan = plans(case, split)[group.rank()]
        slots, routing = dispatch_split(one["x"], one["phi"], one["scale"], case["mix"], plan, gather)
        y = combine(experts(slots, one["weight"]), routing)
        (y * one["grad"][:, place]).sum().backward()
        results.append({"y": y.detach()} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")})
    for starts, block_length in MERGED_CASES:
        one = leaves({**inputs(length, 2.0), "x": inputs(length, 2.0)["x"][:, place]})
        segments = split_segments(starts, block_length, split, group.rank())
        y = through_merged(one, segments, gather)
        (y * one["grad"][:, place]).sum().backward()
        results.append({"y": y.detach()} | {name: one[name].grad for name in ("x", "phi", "scale", "weight")})
    return results, place


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(context_parallel_size=2),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(context_parallel_size=4),
        ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    ],
    ids=["cp2", "sp2", "cp4", "cp2 sp2"],
)
def test_processes_equal_whole_sequences(parallel: ParallelConfig) -> None:
    length, world = 24, parallel.context_parallel_size * parallel.sequence_parallel_size
    by_rank = run_distributed(on_processes, world, parallel, length, timeout=60)
    values = inputs(length, 2.0)
    expected = [whole(values, case) for case in CASES] + [whole_merged(values, *case) for case in MERGED_CASES]
    for number, theirs in enumerate(expected):
        ours = {name: sum(results[number][name] for results, _ in by_rank) for name in ("phi", "scale", "weight")}
        for name in ("x", "y"):
            ours[name] = torch.empty_like(values["x"])
            for results, place in by_rank:
                ours[name][:, place] = results[number][name]
        assert_equal(ours, theirs)
