"""Gradients that are reduced, and weights that are gathered, while others are computed: the numbers stay the same."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from steel_megatron.config import ParallelConfig, RunConfig
from steel_megatron.errors import ConfigError
from tests.distributed import run_distributed
from tests.layouts.following import whole_tensors
from tests.train.fully_sharded_runs import Outcome, interrupted, train_all
from tests.train.small_run import compare, small_run

MODES = {"block_causal": {}, "merged": {"routing_mode": "merged"}}
LAYOUTS = {
    "dp2 grads": ({"overlap_grad_reduce": True}, 2),
    "dp2": ({"overlap_param_gather": True}, 2),
    "ep2 dp2": ({"overlap_param_gather": True, "expert_model_parallel_size": 2}, 4),
    "pp2 vpp2 dp2": (
        {
            "overlap_param_gather": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_layers": [0, 1, 1, 0],
        },
        4,
    ),
    "pp2 dp2": ({"overlap_param_gather": True, "pipeline_model_parallel_size": 2}, 4),
}


def run_of(mode: str, parallel: ParallelConfig) -> RunConfig:
    run = small_run(parallel, steps=4, **{"num_layers": 2, **MODES[mode]})
    training = dataclasses.replace(run.training, skip_non_finite_steps=1)  # the second step is bad
    return dataclasses.replace(run, training=training, optimizer=dataclasses.replace(run.optimizer, epsilon=1e-3))


@cache
def alone() -> dict[str, Outcome]:
    return run_distributed(train_all, 1, {mode: run_of(mode, ParallelConfig()) for mode in MODES})[0]


@cache
def overlapping(processes: int) -> list[dict[str, Outcome]]:
    runs = {
        f"{layout} {mode}": run_of(mode, ParallelConfig(**options))
        for layout, (options, needed) in LAYOUTS.items()
        if needed == processes
        for mode in MODES
    }
    return run_distributed(train_all, processes, runs, True, timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlapping_steps_equal_one_process(layout: str, mode: str) -> None:
    ranks = [rank[f"{layout} {mode}"] for rank in overlapping(LAYOUTS[layout][1])]
    one = alone()[mode]
    compare([rank.steps for rank in ranks], one.steps)
    assert all(rank.skipped == one.skipped for rank in ranks) and any(one.skipped)
    ours, theirs = whole_tensors([rank.weights for rank in ranks]), whole_tensors([one.weights])
    for name, weight in theirs.items():
        assert float((ours[name] - weight).norm() / weight.norm()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_checkpoint_has_the_weights_of_its_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    """They may still be on their way when it is saved."""
    folder = tmp_path_factory.mktemp("run")
    run = small_run(ParallelConfig(overlap_param_gather=True), str(folder), steps=4, num_layers=2)
    for straight, resumed, different, _ in run_distributed(interrupted, 2, run, 4):
        assert straight == resumed and not different


def test_weights_are_not_gathered_early_in_one_bucket() -> None:
    with pytest.raises(ConfigError, match="overlap_grad_reduce = False, without which all weights are one bucket"):
        ParallelConfig(overlap_param_gather=True, overlap_grad_reduce=False)
