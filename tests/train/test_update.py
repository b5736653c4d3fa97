"""The update of one process: as its definition says, in one pass, and without traffic."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from steel_megatron.config import ParallelConfig, RunConfig
from tests.distributed import run_distributed
from tests.train.small_run import own_batches, small_run

BETA1, BETA2 = 0.8, 0.9
BUFFERS = ("c10d::reduce_scatter", "c10d::_reduce_scatter", "c10d::allgather", "c10d::_allgather")
"""What reduces gradients and gathers weights."""


def run_of(clip_grad: float, **parallel: Any) -> RunConfig:
    run = small_run(ParallelConfig(**parallel), num_layers=1)
    settings = {"clip_grad": clip_grad, "beta1": BETA1, "beta2": BETA2, "warmup_steps": 0, "weight_decay": 0.1}
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **settings))


def watched(runs: dict[str, RunConfig]) -> dict[str, tuple[float, dict[str, float], dict[str, int]]]:
    """Two steps of each run: how much each clips, the worst error of the weights, and how often each operation ran.

    AdamW is written out in float64 from the gradients as they are before clipping.
    """
    from steel_megatron.parallel.topology import initialize

    topology = initialize(next(iter(runs.values())).parallel)
    from torch.profiler import ProfilerActivity, profile

    from steel_megatron.train import engine as engine_module
    from steel_megatron.train.engine import Engine

    plain, found = engine_module.update, {}
    for name, run in runs.items():
        engine, settings = Engine(run, topology), run.optimizer
        (model,) = engine.models
        weights = {one: weight.detach().double() for one, weight in model.named_parameters()}
        first = {one: torch.zeros_like(weight) for one, weight in weights.items()}
        second = {one: torch.zeros_like(weight) for one, weight in weights.items()}
        errors: dict[str, float] = {}
        divisors: list[float] = []

        def define(
            optimizer: Any,
            norm: float,
            *,
            model: Any = model,
            settings: Any = settings,
            weights: Any = weights,
            first: Any = first,
            second: Any = second,
            divisors: list[float] = divisors,
        ) -> None:
            limit, rate = settings.clip_grad, optimizer.param_groups[0]["lr"]
            divisors.append(max(1.0, (norm + 1e-6) / limit) if limit else 1.0)
            for one, weight in model.named_parameters():
                gradient = weight.main_grad.double() / divisors[-1]
                first[one].lerp_(gradient, 1 - BETA1)
                second[one].lerp_(gradient**2, 1 - BETA2)
                decay = settings.weight_decay if weight.ndim > 1 else 0.0
                mean, spread = first[one] / (1 - BETA1 ** len(divisors)), second[one] / (1 - BETA2 ** len(divisors))
                weights[one] *= 1 - rate * decay
                weights[one] -= rate * mean / (spread.sqrt() + settings.epsilon)
            plain(optimizer, norm)

        engine_module.update = define
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for step in (1, 2):
                engine.step(own_batches(run, step, topology))
        engine_module.update = plain
        for one, weight in model.named_parameters():
            errors[one] = float((weight - weights[one]).abs().max() / weights[one].abs().max())
        found[name] = divisors[-1], errors, {event.key: event.count for event in profiled.key_averages()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[float, dict[str, float], dict[str, int]]]:
    runs = {"clipped": run_of(0.05), "not clipped": run_of(1e6), "without a limit": run_of(0.0)}
    runs["overlapping"] = run_of(0.05, overlap_grad_reduce=True, overlap_param_gather=True)
    return run_distributed(watched, 1, runs)[0]


@pytest.mark.parametrize("name", ["clipped", "not clipped", "without a limit", "overlapping"])
def test_clipping_and_adamw_are_computed_in_one_pass(name: str, alone: dict[str, Any]) -> None:
    divisor, errors, operations = alone[name]
    assert (divisor > 2) == (name in ("clipped", "overlapping"))
    assert max(errors.values()) < 1e-6, errors
    assert operations["aten::_fused_adamw_"] == 4  # for matrices and for vectors, which do not decay
    assert "aten::addcdiv_" not in operations and "aten::_foreach_addcdiv_" not in operations


@pytest.mark.parametrize("name", ["clipped", "overlapping"])
def test_one_process_neither_reduces_nor_gathers_buffers(name: str, alone: dict[str, Any]) -> None:
    """Reducing over one process would copy all gradients, and gathering all weights."""
    operations = alone[name][2]
    assert not [one for one in operations if one.startswith(BUFFERS)]


def buffers_reduced(run: RunConfig) -> list[str]:
    """What two processes send for a step."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from torch.profiler import ProfilerActivity, profile

    from steel_megatron.train.engine import Engine

    engine = Engine(run, topology)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        engine.step(own_batches(run, 1, topology))
    return [event.key for event in profiled.key_averages() if event.key.startswith(BUFFERS)]


def test_two_processes_do() -> None:
    for sent in run_distributed(buffers_reduced, 2, run_of(0.05)):
        assert len(sent) == 2, sent
