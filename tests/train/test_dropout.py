"""Dropout: masks of every place, the same under every layout and after a resume."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.model.dropout import Dropout
from steel_megatron.parallel.sequence import SequenceSplit
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, compare, own_batches, small_run, train

WITH_DROPOUT = {"hidden_dropout": 0.3, "attention_dropout": 0.2, "num_layers": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def dropout(
    at: tuple[int, int, int] = (0, 1, 0),
    context: tuple[int, int] = (0, 1),
    tensor: tuple[int, int] = (0, 1),
    sequence_parallel: bool = False,
) -> Dropout:
    """Of process ``(rank, size)`` of the context- and the tensor-parallel group, in a micro batch."""

    def group(place: tuple[int, int]) -> Any:
        return SimpleNamespace(rank=lambda: place[0], size=lambda: place[1])

    groups: Any = SimpleNamespace(cp=group(context), tp=group(tensor))
    made = Dropout(0.3, 0.2, groups, sequence_parallel=sequence_parallel)
    made.set(*at)
    return made


HIDDEN, WEIGHTS = torch.ones(64, 4, 48), torch.ones(4, 4, 32, 32)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """In standard deviations of what independent values would give."""
    together = torch.stack((one.flatten(), other.flatten()))
    return abs(float(torch.corrcoef(together)[0, 1])) * math.sqrt(one.numel())


@pytest.mark.parametrize(("kind", "probability"), [("hidden", 0.3), ("attention", 0.2)])
def test_masks_are_independent_and_keep_the_mean(kind: str, probability: float) -> None:
    def mask(layer: int = 1, place: int = 2, **at: Any) -> torch.Tensor:
        one = dropout(**at)
        return one.drop_hidden(HIDDEN, layer, place) if kind == "hidden" else one.drop_attention(WEIGHTS, layer, 0)

    first = mask()
    assert sorted(first.unique().tolist()) == pytest.approx([0.0, 1 / (1 - probability)])
    spread = 5 / math.sqrt(first.numel())
    assert float(first.mean()) == pytest.approx(1.0, abs=spread * math.sqrt(probability / (1 - probability)))
    for axis in range(first.dim()):  # neighbours along each axis
        size = first.size(axis) - 1
        assert correlation(first.narrow(axis, 0, size), first.narrow(axis, 1, size)) < 5, axis
    others = [mask(layer=2), mask(at=(1, 1, 0)), mask(at=(0, 2, 0)), mask(at=(0, 1, 4)), mask(at=(2**62, 10**9, 0))]
    others += [mask(place=3), mask(layer=0, place=0)] if kind == "hidden" else []
    for number, other in enumerate(others):
        assert correlation(first, other) < 5, number
    # What a second micro batch of one process has, the second process of two has.
    samples = 1 if kind == "hidden" else 0  # their axis
    assert torch.equal(mask(at=(0, 1, 2)).narrow(samples, 0, 2), first.narrow(samples, 2, 2))


def test_processes_have_their_parts_of_one_mask() -> None:
    whole = dropout().drop_hidden(HIDDEN, 1, 2)
    assert torch.equal(dropout(tensor=(1, 2)).drop_hidden(HIDDEN, 1, 2), whole)
    for context, tensor in ((2, 1), (1, 2), (2, 2)):
        split = SequenceSplit(64, context, tensor)
        for rank in range(split.ranks):
            places, positions = ((rank // tensor, context), (rank % tensor, tensor)), split.positions(rank)
            own = dropout((0, 1, 0), *places, sequence_parallel=tensor > 1).drop_hidden(HIDDEN[positions], 1, 2)
            assert torch.equal(own, whole[positions]), (context, tensor, rank)
    whole = dropout().drop_attention(WEIGHTS, 1, 0)
    assert torch.equal(dropout(tensor=(1, 2)).drop_attention(WEIGHTS[:, 2:], 1, 0), whole[:, 2:])
    assert torch.equal(dropout().drop_attention(WEIGHTS[:, :, 8:16, :16], 1, 8), whole[:, :, 8:16, :16])


def test_evaluation_drops_nothing_and_attention_is_the_same_without_its_kernel() -> None:
    """With a probability that never comes true, attention stores its weights and drops none of them."""
    plain = small_run(ParallelConfig(), steps=1, num_layers=1, megatron={"softmax_scale": 0.5})
    packed = dataclasses.replace(plain, data=DataConfig(reset_at_eod=True))
    runs = {"plain": plain, "packed": packed}
    for name, run in list(runs.items()):
        for dropped in ({"attention_dropout": 1e-12}, {"attention_dropout": 0.4}, {"hidden_dropout": 0.4}):
            runs[f"{name} {dropped}"] = dataclasses.replace(run, model=dataclasses.replace(run.model, **dropped))
    figures = run_distributed(steps_and_evaluations, 1, runs)[0]
    for name in ("plain", "packed"):
        none, never, attention, hidden = (figures[one] for one in runs if one.startswith(name))
        assert never == pytest.approx(none, rel=1e-6), name
        assert none[1] == attention[1] == hidden[1], name
        assert len({one[0] for one in (none, attention, hidden)}) == 3, name


def steps_and_evaluations(runs: dict[str, RunConfig]) -> dict[str, tuple[float, float, float]]:
    """Of fresh engines: the loss of the gradient's batch, an evaluation's of the same, and the gradient's norm."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine, minimised

    topology, found = initialize(ParallelConfig()), {}
    for name, run in runs.items():
        engine, batches = Engine(run, topology), own_batches(run, 0, topology)
        evaluated = minimised(engine.evaluate(batches)).mean
        step = engine.step(batches)
        found[name] = (step.loss, evaluated, step.grad_norm)
    return found


def several(runs: dict[str, RunConfig]) -> dict[str, list[Any]]:
    return {name: train(run) for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_layouts_compute_what_one_process_computes() -> None:
    """With layers that are computed again in the backward pass, after other micro batches of a pipeline."""
    alone = small_run(ParallelConfig(), steps=2, **WITH_DROPOUT)
    again = small_run(ParallelConfig(), steps=2, megatron=FULL, **WITH_DROPOUT)
    ones = run_distributed(several, 1, {"alone": alone, "again": again})[0]
    compare([ones["again"]], ones["alone"])
    layouts = ("tp2 pp2", "cp2 tp2 sp", "tp2 ep2", "cp2 pp2")
    runs = {name: small_run(LAYOUTS[name], steps=2, **WITH_DROPOUT) for name in layouts}
    runs["recomputed"] = small_run(LAYOUTS["tp2 pp2"], steps=2, megatron=FULL, **WITH_DROPOUT)
    ranks = run_distributed(several, 4, runs, timeout=350)
    for name in runs:
        compare([rank[name] for rank in ranks], ones["alone"])
