"""Fully sharded data parallelism computes what one process computes, in a share of its memory."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from steel_megatron.config import CheckpointConfig, DataConfig, ParallelConfig, RunConfig
from steel_megatron.errors import ConfigError
from steel_megatron.report import read_scalars
from tests.distributed import run_distributed
from tests.layouts.following import whole_tensors
from tests.train.fully_sharded_runs import (
    Outcome,
    interrupted,
    pass_on,
    read_all,
    save_after_training,
    train_all,
)
from tests.train.small_run import LAYOUTS, compare, small_run
from tests.train.test_loop import make_run, outcome, write_corpus

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "block_causal": (20, {}),
    "merged": (2, {"routing_mode": "merged"}),
    "dense": (2, {"ffn": "dense", "routing_mode": None}),
    "documents": (2, {"routing_mode": "merged", "reset_at_eod": True}),
    "a step without numbers": (3, {}),
}
"""Steps and network; tests/layouts has the others."""
CASES: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
    **{("dp2", variant): (2, {}) for variant in VARIANTS},
    ("dp4", "block_causal"): (4, {}),
    ("tp2", "block_causal"): (4, {"tensor_model_parallel_size": 2}),
    ("tp2 etp1 ep2", "merged"): (
        4,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
    ),
    ("ep2", "documents"): (4, {"expert_model_parallel_size": 2}),
}
"""Layout and variant; processes and degrees."""


def run_of(variant: str, parallel: ParallelConfig, steps: int | None = None) -> RunConfig:
    own_steps, model = VARIANTS[variant]
    fields = {"num_layers": 2, **model}
    at_eod = fields.pop("reset_at_eod", False)
    run = small_run(parallel, steps=steps or own_steps, **fields)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, reset_at_eod=at_eod))
    skips = int(variant == "a step without numbers")
    training = dataclasses.replace(run.training, skip_non_finite_steps=skips)
    # Adam divides by a gradient's own size: with a tiny epsilon, gradients that are nearly zero would move by rounding.
    return dataclasses.replace(run, training=training, optimizer=dataclasses.replace(run.optimizer, epsilon=1e-3))


@cache
def alone() -> dict[str, Outcome]:
    return run_distributed(train_all, 1, {variant: run_of(variant, ParallelConfig()) for variant in VARIANTS})[0]


@cache
def sharded(processes: int) -> list[dict[str, Outcome]]:
    """What each process saw of all cases with this number of processes; 20 steps are for the first of them."""
    runs = {
        f"{layout} {variant}": run_of(variant, ParallelConfig(fsdp=True, **degrees), None if layout == "dp2" else 2)
        for (layout, variant), (needed, degrees) in CASES.items()
        if needed == processes
    }
    return run_distributed(train_all, processes, runs, timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_sharded_weights_train_as_one_process(layout: str, variant: str) -> None:
    processes, _ = CASES[layout, variant]
    ranks = [rank[f"{layout} {variant}"] for rank in sharded(processes)]
    one = alone()[variant]
    steps = len(ranks[0].steps) - 1
    compare([rank.steps[:steps] for rank in ranks], one.steps[:steps])
    if steps < len(one.steps) - 1:
        return
    compare([rank.steps[steps:] for rank in ranks], one.steps[steps:])
    ours, theirs = whole_tensors([rank.weights for rank in ranks]), whole_tensors([one.weights])
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((ours[name] - weight).norm() / weight.norm()) < 1e-5, name
    assert all(rank.skipped == one.skipped for rank in ranks)
    assert any(one.skipped) == (variant == "a step without numbers")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_holds_its_share_of_weights_gradients_and_optimizer_state() -> None:
    whole = alone()["block_causal"]
    weights = sum(piece.numel() for piece in whole.weights.values())
    assert whole.live_bytes >= 16 * weights
    for processes in (2, 4):
        for rank in sharded(processes):
            live_bytes = rank[f"dp{processes} block_causal"].live_bytes
            assert 16 * weights / processes * 0.9 < live_bytes < 16 * weights / processes * 1.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkpoints_fit_every_other_layout_bit_by_bit(tmp_path: Path) -> None:
    layouts = {
        "fsdp": ParallelConfig(fsdp=True),
        "tp2": LAYOUTS["tp2"],
        "fsdp ep2": ParallelConfig(fsdp=True, expert_model_parallel_size=2),
        "pp2": LAYOUTS["pp2"],
    }
    folders = {name: str(tmp_path / name) for name in [*layouts, "alone"]}

    def run_in(name: str) -> RunConfig:
        run = run_of("block_causal", layouts.get(name, ParallelConfig()), steps=2)
        return dataclasses.replace(run, checkpoint=CheckpointConfig(directory=folders[name]))

    run_distributed(save_after_training, 2, run_in("fsdp"))
    chain = ["tp2", "fsdp ep2", "pp2"]  # each loads what the one before it has saved
    run_distributed(pass_on, 2, [(run_in(name), folders[before]) for before, name in pairwise(["fsdp", *chain])])
    run_distributed(pass_on, 1, [(run_in("alone"), folders["pp2"])])
    found = run_distributed(read_all, 1, list(folders.values()))[0]
    first = found[folders["fsdp"]]
    assert sum(name.startswith("optimizer.state.exp_avg.") for name in first) > 10
    assert all(tensor.any() for name, tensor in first.items() if name.startswith("optimizer."))
    for folder in folders.values():
        assert found[folder].keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(found[folder][name], tensor), (folder, name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resume_is_bit_equal(tmp_path: Path) -> None:
    run = small_run(
        ParallelConfig(fsdp=True), str(tmp_path), steps=4, num_layers=2, hidden_dropout=0.1, attention_dropout=0.1
    )
    for straight, resumed, different, _ in run_distributed(interrupted, 2, run, 4):
        assert straight == resumed and not different


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_through_the_loop(tmp_path: Path) -> None:
    """With what callbacks compute: an audit before the first step, and figures of the routing after each.

    Those are means over what each process computed last, so they are compared with as many replicas.
    """
    data = DataConfig(
        train=[write_corpus(tmp_path / "train", 60, 0)], validation=[write_corpus(tmp_path / "valid", 12, 1)]
    )
    found = []
    for name in ("replicas", "fsdp"):
        run = make_run(data, tmp_path / name, ParallelConfig(fsdp=name == "fsdp"), train_steps=3)
        run = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, routing_mode="sequence"),
            training=dataclasses.replace(run.training, routing_metrics_interval=1),
        )
        summary = run_distributed(outcome, 2, run)[-1]
        scalars = read_scalars(run.tensorboard_dir)
        figures = {name: values[-1][1] for name, values in scalars.items() if name.startswith("routing/")}
        found.append((summary.loss, summary.validation_loss, figures))
    theirs, ours = found
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
    assert len(theirs[2]) > 10 and ours[2] == pytest.approx(theirs[2], rel=1e-4)


@pytest.mark.parametrize("option", ["overlap_grad_reduce", "overlap_param_gather"])
def test_it_has_its_own_overlap(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is False with fsdp = True, which gathers weights"):
        ParallelConfig(fsdp=True, **{option: False})


def test_the_layout_names_it() -> None:
    assert ParallelConfig(fsdp=True).describe(4) == "TP1 PP1 EP1 DP4 FSDP"
    assert torch.equal(
        whole_tensors([{"w|0|0": torch.ones(2)}, {"w|2|0": torch.zeros(1)}])["w"], torch.tensor([1.0, 1, 0])
    )
