"""What a Soft-MoE layer sends, counted: slots and their sums travel, tokens do not (docs/parallelism.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from steel_megatron.config import ModelConfig, ParallelConfig
from tests.distributed import run_distributed

BATCH, WIDTH, EXPERTS, PER_EXPERT = 2, 16, 4, 2
SLOTS = EXPERTS * PER_EXPERT
FLOAT = 4
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
CP2, CP4 = ParallelConfig(context_parallel_size=2), ParallelConfig(context_parallel_size=4)
EP2 = ParallelConfig(expert_model_parallel_size=2)
CP2_EP2 = ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2)
TP2_ETP1_EP2 = ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1, expert_model_parallel_size=2)
TP2_SP_ETP1_EP2 = dataclasses.replace(TP2_ETP1_EP2, sequence_parallel=True)
ETP2 = ParallelConfig(expert_tensor_parallel_size=2)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Bytes that leave this process, by collective, as rings and direct exchanges send them."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    sent: dict[str, float] = {}

    def counting(name: str, plain: Any, argument: int) -> Any:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            size, data = dist.get_world_size(kwargs.get("group")), args[argument]
            # Of R parts one stays here; an all-gather's argument is one part; an all-reduce is a reduce-scatter and
            # an all-gather.
            share = {"all_gather_into_tensor": size - 1, "all_reduce": 2 * (size - 1) / size}.get(
                name, (size - 1) / size
            )
            sent[name] = sent.get(name, 0) + data.numel() * data.element_size() * share
            return plain(*args, **kwargs)

        return call

    places = [(dist, name, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")]
    places += [(mappings, "dist_all_gather_func", "all_gather_into_tensor")]
    places += [(mappings, "dist_reduce_scatter_func", "reduce_scatter_tensor"), (dist, "all_reduce", "all_reduce")]
    plain = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in places]
    for module, attribute, name in places:
        setattr(module, attribute, counting(name, getattr(module, attribute), 0 if name == "all_reduce" else 1))
    try:
        yield sent
    finally:
        for module, attribute, function in plain:
            setattr(module, attribute, function)


def layer_bytes(
    parallel: ParallelConfig, cases: list[dict[str, Any]], document_starts: torch.Tensor | None = None
) -> list[tuple[float, int]]:
    """For each model: bytes that one layer sends, forward and backward, and the blocks that the experts computed."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    topology, results = initialize(parallel), []
    for case in cases:
        model = ModelConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_attention_heads=2,
            ffn_hidden_size=8,
            num_experts=EXPERTS,
            slots_per_expert=PER_EXPERT,
            vocab_size=128,
            **case,
        )
        layer = build_model(model, topology, seed=1).decoder.layers[0].mlp
        ranks = parallel.context_parallel_size * parallel.sequence_parallel_size
        hidden = torch.randn(model.sequence_length // ranks, BATCH, WIDTH, requires_grad=True)
        seen: list[int] = []
        if model.ffn == "soft_moe":
            layer.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].size(1)))
        if document_starts is not None:
            layer.documents.set(document_starts)
        with counted() as sent:
            layer(hidden)[0].square().sum().backward()
        results.append((sum(sent.values()), seen[0] // (BATCH * PER_EXPERT) if seen else 0))
    return results


def causal(length: int, block_length: int, **more: Any) -> dict[str, Any]:
    return {"routing_mode": "block_causal", "sequence_length": length, "block_length": block_length, **more}


def sequence(length: int) -> dict[str, Any]:
    return {"routing_mode": "sequence", "sequence_length": length}


def of_totals(parallel: ParallelConfig, parts: int) -> float:
    """S * (d + 1) float32 numbers for each sequence and part, to every other process, and their gradients back."""
    ranks = parallel.context_parallel_size * parallel.sequence_parallel_size
    return 2 * (ranks - 1) * parts * BATCH * SLOTS * (WIDTH + 1) * FLOAT


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "pieces"), [(CP2, 2), (CP4, 2), (TP2_SP, 1)], ids=["cp2", "cp4", "tp2 sp"])
def test_processes_that_share_a_sequence_send_sums_of_slots(parallel: ParallelConfig, pieces: int) -> None:
    ranks = parallel.context_parallel_size * parallel.sequence_parallel_size
    cases = [sequence(64), sequence(256), causal(64, 8), causal(256, 32), causal(64, 7)]
    for sent in run_distributed(layer_bytes, ranks, parallel, cases, timeout=60):
        for (ours, blocks), case in zip(sent, cases, strict=True):
            aligned = 64 % case.get("block_length", 1) == 0
            expected = of_totals(parallel, pieces if aligned else 2 * pieces)
            if parallel is TP2_SP and case["routing_mode"] == "sequence":
                # All processes have the same slots: gate and value of the way down are summed, forward and backward.
                expected += 2 * 2 * (ranks - 1) / ranks * BATCH * SLOTS * 2 * WIDTH * FLOAT
            elif parallel is TP2_SP:
                # Slots are gathered before the experts, gate and value scattered after, and the same backward.
                expected += 2 * (ranks - 1) * blocks * BATCH * SLOTS * 3 * WIDTH * FLOAT
            assert ours == expected, case
        if parallel is not TP2_SP:
            # Four times the tokens, and not a byte more.
            assert sent[0] == sent[1] and sent[2][0] == sent[3][0]


def test_slots_that_sequence_parallelism_gathers_are_those_of_the_own_tokens() -> None:
    """64 tokens, halved: the first half reads the refreshes at 1, 2, 4, 8, 16, 24, the second four; both send six."""
    for sent in run_distributed(layer_bytes, 2, TP2_SP, [causal(64, 8)], timeout=60):
        assert sent[0][1] == 6


@pytest.mark.parametrize("mode", ["sequence", "block_causal"])
def test_expert_parallelism_against_top_k_routing(mode: str) -> None:
    length, top_k = 64, 2
    case = sequence(length) if mode == "sequence" else causal(length, 8)
    refreshes = 1 if mode == "sequence" else 3 + 7  # 1, 2, 4, then 8, 16, ... 56
    for sent in run_distributed(layer_bytes, 2, EP2, [case], timeout=60):
        ours, _ = sent[0]
        leaves_process = 1 / 2
        # To the experts and back, forward and backward.
        assert ours == 4 * BATCH * refreshes * SLOTS * WIDTH * FLOAT * leaves_process
        of_top_k = 4 * BATCH * length * top_k * WIDTH * FLOAT * leaves_process
        assert ours / of_top_k == pytest.approx(refreshes * SLOTS / length / top_k)


def test_experts_on_context_parallel_processes_get_equally_many_slots() -> None:
    """Each process's slots go out, the largest number of blocks from both; the sums of slots travel as without."""
    for sent in run_distributed(layer_bytes, 2, CP2_EP2, [causal(64, 8)], timeout=60):
        ours, _ = sent[0]
        blocks = 6  # process 0: 1, 2, 4, 8 and 48, 56; process 1: 16, 24, 32, 40
        assert ours == of_totals(CP2_EP2, 2) + 4 * BATCH * blocks * SLOTS * WIDTH * FLOAT / 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "merged"])
def test_tokens_stay_under_context_parallelism_in_every_mode(mode: str) -> None:
    lengths = (64, 256)
    cases = [{"routing_mode": mode, "sequence_length": length, "block_length": 8} for length in lengths]
    for sent in run_distributed(layer_bytes, 2, CP2, cases, timeout=60):
        means = 2 * BATCH * 2 * WIDTH * FLOAT if mode == "merged" else 0  # of each piece's last segment, there and back
        assert [ours for ours, _ in sent] == [means, means]


def test_every_token_travels_to_cut_weights_under_sequence_parallelism_as_in_a_dense_layer() -> None:
    length, block_length = 64, 8
    own = BATCH * length // 2
    cases = [
        {"ffn": "dense"},
        {"ffn": "dense", "ffn_activation": "swiglu"},
        {"routing_mode": "token"},
        {"routing_mode": "merged", "block_length": block_length},
    ]
    means = 2 * BATCH * WIDTH
    shares = 3 * own // block_length * EXPERTS
    expected = [6 * own * WIDTH, 4 * own * WIDTH, (2 + 4 * EXPERTS) * own * WIDTH, 8 * own * WIDTH + means + shares]
    for sent in run_distributed(layer_bytes, 2, TP2_SP, [{"sequence_length": length} | case for case in cases]):
        assert [ours for ours, _ in sent] == [numbers * FLOAT for numbers in expected]


@pytest.mark.slow
def test_documents_send_no_more_than_two_spans_of_a_chunk() -> None:
    """Documents of 10 tokens and blocks of 8: chunks of 16 end inside of both."""
    starts = (torch.arange(64) // 10 * 10).expand(BATCH, -1)
    cases = [sequence(64), causal(64, 8), {"routing_mode": "merged", "sequence_length": 64, "block_length": 8}]
    by_rank = run_distributed(layer_bytes, 2, CP2, cases, starts, timeout=60)
    for sent in by_rank:
        # In sequence, a chunk has a part of the document at its beginning and of the one at its end.
        assert sent[0][0] == of_totals(CP2, 4)
        assert sent[1][0] <= of_totals(CP2, 4)
        assert sent[2][0] <= 2 * BATCH * 4 * WIDTH * FLOAT and sent[2][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequence", "block_causal"])
def test_experts_that_are_whole_get_each_slot_from_one_of_the_tensor_parallel_processes(mode: str) -> None:
    """Both hold the same slots without sequence parallelism: each sends half, and gets the results of all."""
    case = sequence(64) if mode == "sequence" else causal(64, 8)
    slots = BATCH * SLOTS * (1 if mode == "sequence" else 10) * WIDTH
    for sent in run_distributed(layer_bytes, 2, TP2_ETP1_EP2, [case], timeout=60):
        to_experts, halves = 4 * slots / 2 / 2, 2 * slots / 2
        assert sent[0][0] == (to_experts + halves) * FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequence", "block_causal"])
def test_whole_experts_under_sequence_parallelism(mode: str) -> None:
    """Slots go to their experts, and are not gathered; in ``sequence`` both have the same, and send halves."""
    case = sequence(64) if mode == "sequence" else causal(64, 8)
    expected = of_totals(TP2_SP_ETP1_EP2, 1)
    if mode == "sequence":
        slots = BATCH * SLOTS * WIDTH
        expected += (4 * slots / 2 / 2 + 2 * slots / 2) * FLOAT
    else:
        blocks = 6  # of the first half's tokens; the second half's are filled up
        expected += 4 * BATCH * blocks * SLOTS * WIDTH / 2 * FLOAT
    for sent in run_distributed(layer_bytes, 2, TP2_SP_ETP1_EP2, [case], timeout=60):
        assert sent[0][0] == expected


@pytest.mark.slow
def test_experts_cut_over_data_parallel_processes() -> None:
    """Slots are gathered before the up projection; gate and value are scattered after the down projection."""
    cases = [sequence(64), sequence(64) | {"ffn_activation": "swiglu"}]
    for sent in run_distributed(layer_bytes, 2, ETP2, cases, timeout=60):
        slots = BATCH * SLOTS * WIDTH
        assert [ours for ours, _ in sent] == [6 * slots * FLOAT, 4 * slots * FLOAT]


@pytest.mark.slow
def test_top_k_routing_sends_each_token_to_k_experts() -> None:
    length, top_k = 64, 2
    case = {"ffn": "top_k_moe", "ffn_activation": "swiglu", "routing_mode": None, "sequence_length": length}
    by_rank = run_distributed(layer_bytes, 2, EP2, [case], timeout=60)
    # A process that gets more than it brings sends more on the way back; over both it is this:
    tokens = 2 * BATCH * length * top_k * (4 * WIDTH + 2) / 2  # there and back, twice; the weights once each way
    counts = 2 * EXPERTS * 8
    assert sum(sent[0][0] for sent in by_rank) == tokens * FLOAT + counts
