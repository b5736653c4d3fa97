"""Every parallel layout computes what one process computes."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, SHARED_LAYOUTS, compare, small_run, train
from tests.train.test_loop import make_run, outcome, write_corpus

VARIANTS: dict[str, dict[str, Any]] = {
    "block_causal": {},
    # Tokens of length 1 take large weights: the experts are cubic.
    "sequence normalized": {"routing_mode": "sequence", "slot_input": "normalized", "expert_init_method_std": 0.5},
    "token": {"routing_mode": "token", "slots_per_expert": 1},
    "merged": {"routing_mode": "merged"},
    "swiglu": {"ffn_activation": "swiglu", "shared_expert_intermediate_size": 0},
    "dense": {"ffn": "dense", "routing_mode": None},
    # Segments and blocks of 3 tokens end with the pieces of every layout that shares sequences; blocks of 8 do not, and
    # cp4's pieces are shorter than they are.
    "merged, short segments": {"routing_mode": "merged", "block_length": 3},
    "block_causal, short blocks": {"block_length": 3},
}
PLAIN_LAYOUTS = [name for name in LAYOUTS if name not in SHARED_LAYOUTS]


@cache
def alone(variant: str, steps: int) -> list[Any]:
    return run_distributed(train, 1, small_run(ParallelConfig(), steps=steps, **VARIANTS[variant]))[0]


def hold_to_one_process(layout: str, variant: str, steps: int) -> None:
    run = small_run(LAYOUTS[layout], steps=steps, **VARIANTS[variant])
    compare(run_distributed(train, PROCESSES[layout], run), alone(variant, steps))


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS)
def test_ten_steps_equal_one_process(layout: str) -> None:
    hold_to_one_process(layout, "block_causal", steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
@pytest.mark.parametrize("variant", ["sequence normalized", "token", "merged", "swiglu", "dense"])
def test_other_networks_equal_one_process(layout: str, variant: str) -> None:
    if variant == "dense" and layout == "ep2":
        return  # a dense layer has no experts to share; the configuration refuses it
    hold_to_one_process(layout, variant, steps=3)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", SHARED_LAYOUTS)
def test_shared_sequences_equal_one_process(layout: str) -> None:
    hold_to_one_process(layout, "block_causal", steps=3)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["tp2 sp", "cp2 ep2", "cp2 tp2 sp", "cp4"])
@pytest.mark.parametrize(
    "variant",
    ["sequence normalized", "token", "merged, short segments", "block_causal, short blocks", "swiglu", "dense"],
)
def test_other_networks_on_shared_sequences_equal_one_process(layout: str, variant: str) -> None:
    if variant == "dense" and "ep2" in layout:
        return
    hold_to_one_process(layout, variant, steps=3)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_bfloat16_on_shared_sequences_stays_near_one_process() -> None:
    def in_bfloat16(layout: ParallelConfig) -> RunConfig:
        run = small_run(layout, steps=2)
        return dataclasses.replace(run, training=dataclasses.replace(run.training, precision="bfloat16"))

    one = run_distributed(train, 1, in_bfloat16(ParallelConfig()))[0]
    compare(run_distributed(train, 4, in_bfloat16(LAYOUTS["cp2 tp2 sp"])), one, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("before", "after"), [("cp2", "tp2 sp"), ("cp2 tp2 sp", "dp2"), ("tp2 ep2", "cp2 ep2")])
def test_checkpoints_fit_layouts_that_share_sequences_otherwise(before: str, after: str, tmp_path: Path) -> None:
    uninterrupted = alone("block_causal", 4)
    for name, first, last in ((before, 1, 2), (after, 3, 4)):
        run = small_run(LAYOUTS[name], str(tmp_path), steps=4)
        results = run_distributed(train, PROCESSES[name], run, first, last, first == 1, first != 1)
        compare([rank[:-1] for rank in results], uninterrupted[first - 1 : last])


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["cp2", "tp2 sp"])
def test_a_run_reads_its_part_of_every_sample(layout: str, tmp_path: Path) -> None:
    """From indexed corpora to the validation loss, through the training loop."""
    data = DataConfig(
        train=[write_corpus(tmp_path / "train", 60, 0)], validation=[write_corpus(tmp_path / "valid", 12, 1)]
    )
    summaries = []
    for name, processes in (("alone", 1), (layout, PROCESSES[layout])):
        run = make_run(data, tmp_path / name, LAYOUTS.get(name, ParallelConfig()), train_steps=3)
        summaries.append(run_distributed(outcome, processes, run)[-1])
    theirs, ours = summaries
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-5)


def test_the_small_run_learns() -> None:
    losses = [step.loss for step in alone("block_causal", 10)[:10]]
    assert losses[-1] < losses[0] - 0.1
