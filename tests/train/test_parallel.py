"""Every parallel layout computes what one process computes."""

from __future__ import annotations

from functools import cache

import pytest

from steel_megatron.config import ParallelConfig
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, small_run, train

VARIANTS = {
    "block_causal": {},
    "sequence normalized": {"routing_mode": "sequence", "routing_mix": "normalized"},
    "token": {"routing_mode": "token", "slots_per_expert": 1},
    "merged": {"routing_mode": "merged"},
    "swiglu": {"ffn_activation": "swiglu", "shared_expert_intermediate_size": 0},
    "dense": {"ffn": "dense", "routing_mode": None},
}


@cache
def alone(variant: str, steps: int) -> list[tuple[float, float]]:
    return run_distributed(train, 1, small_run(ParallelConfig(), steps=steps, **VARIANTS[variant]))[0]


def compare(layout: str, variant: str, steps: int) -> None:
    run = small_run(LAYOUTS[layout], steps=steps, **VARIANTS[variant])
    for rank, together in enumerate(run_distributed(train, PROCESSES[layout], run)):
        for step, (ours, theirs) in enumerate(zip(together, alone(variant, steps), strict=True), start=1):
            assert ours == pytest.approx(theirs, rel=1e-5), f"rank {rank}, step {step}: (loss, gradient norm) differs"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_equal_one_process(layout: str) -> None:
    compare(layout, "block_causal", steps=10)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "block_causal"])
def test_other_networks_equal_one_process(layout: str, variant: str) -> None:
    if variant == "dense" and layout == "ep2":
        return  # a dense layer has no experts to share; the configuration refuses it
    compare(layout, variant, steps=3)


def test_the_small_run_learns() -> None:
    losses = [loss for loss, _ in alone("block_causal", 10)[:10]]
    assert losses[-1] < losses[0] - 0.1
