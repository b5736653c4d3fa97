"""Training in float16: the loss scale falls where gradients overflow, rises again, and is the same everywhere."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.train import bad_steps
from steel_megatron.train.bad_steps import BadSteps
from steel_megatron.train.loss_scale import first_loss_scale
from tests.distributed import run_distributed
from tests.train.fully_sharded_runs import interrupted
from tests.train.small_run import own_batches, small_run

SCALING = {"initial_loss_scale": 2.0**20, "loss_scale_window": 3, "hysteresis": 1}
"""It falls for some ten steps, and then finds the largest scale that fits again and again."""
LAYOUTS = {
    "dp2 overlap": (ParallelConfig(overlap_param_gather=True), 2),
    "fsdp": (ParallelConfig(fsdp=True), 2),
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "ep2": (ParallelConfig(expert_model_parallel_size=2), 2),
    "fsdp ep2": (ParallelConfig(fsdp=True, expert_model_parallel_size=2), 2),
}
STEPS = 24


def in_float16(parallel: ParallelConfig, directory: str = "unused", steps: int = STEPS) -> RunConfig:
    run = small_run(parallel, directory, steps=steps, num_layers=2)
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, precision="float16"),
        optimizer=dataclasses.replace(run.optimizer, megatron=SCALING),
    )


Course = list[tuple[float, float, float, str | None]]


def train(runs: dict[str, RunConfig]) -> dict[str, Course]:
    """Loss, gradient norm, loss scale and why it was skipped, of each step."""
    from steel_megatron.parallel.topology import initialize

    courses = {}
    for name, run in runs.items():
        topology = initialize(run.parallel)
        from steel_megatron.train.engine import Engine

        engine = Engine(run, topology)
        steps = [engine.step(own_batches(run, step, topology)) for step in range(1, STEPS + 1)]
        courses[name] = [(one.loss, one.grad_norm, one.loss_scale or 0.0, one.skipped) for one in steps]
    return courses


@cache
def alone() -> Course:
    return run_distributed(train, 1, {"alone": in_float16(ParallelConfig())})[0]["alone"]


@cache
def in_two() -> list[dict[str, Course]]:
    return run_distributed(train, 2, {name: in_float16(parallel) for name, (parallel, _) in LAYOUTS.items()})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_scale_falls_until_gradients_fit_and_rises_again() -> None:
    course = alone()
    scales = [scale for _, _, scale, _ in course]
    assert scales[0] == 2.0**20
    fits = 0  # steps since the last overflow
    for (_, norm, scale, skipped), after in zip(course, scales[1:], strict=False):
        overflows = skipped is not None
        if overflows:
            assert skipped == f"gradients overflow float16 at a loss scale of {scale:g}" and not norm < float("inf")
        fits = 0 if overflows else fits + 1
        assert after == (scale / 2 if overflows else scale * 2 if fits == 3 else scale)
        fits %= 3
    trained = [scale for *_, scale, skipped in course if skipped is None]
    assert 5 < len(trained) < STEPS - 5
    assert max(trained) > trained[0]  # it has risen


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_scale_and_train_alike(layout: str) -> None:
    """Losses to a hundredth; an overflow may come a step earlier where a process sums more numbers in float16."""
    course = alone()
    for rank in in_two():
        ours = rank[layout]
        first = next(number for number, step in enumerate(course) if step[3] is None)
        near = next(number for number, step in enumerate(ours) if step[3] is None)
        assert abs(first - near) <= 1
        assert ours[near][1] == pytest.approx(course[first][1], rel=0.02)
        losses = [[step[0] for step in steps if step[3] is None][:4] for steps in (ours, course)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert str(in_two()[0][layout]) == str(in_two()[1][layout])  # numbers that are none are the same, too


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_resume_is_bit_equal(fsdp: bool, tmp_path: Path) -> None:
    run = in_float16(ParallelConfig(fsdp=fsdp, expert_model_parallel_size=1 if fsdp else 2), str(tmp_path))
    easier = dataclasses.replace(run.optimizer, megatron={**SCALING, "initial_loss_scale": 2.0**19, "hysteresis": 2})
    run = dataclasses.replace(run, optimizer=easier)
    for straight, resumed, different, state in run_distributed(interrupted, 2, run, 14):
        assert straight == resumed and not different
        assert len(state) == 3 and state[0] < 2.0**19 and state[1:] != (0, 2)  # in the middle of something


def test_without_room_to_fall_an_overflow_is_a_bad_step() -> None:
    class Scale:
        can_fall, value, state = True, 8.0, (8.0, 0, 1)

    scale: Any = Scale()
    policy = BadSteps(TrainingConfig(precision="float16"), scale)
    assert policy.why_skip(1, 1.0, float("inf"), 5) == "gradients overflow float16 at a loss scale of 8"
    assert policy.too_many is None and policy.skipped == 1
    assert policy.history.loss_scale == (8.0, 0, 1)
    assert policy.why_skip(2, float("nan"), float("nan"), 5) == "the loss is nan"
    assert policy.too_many == "training.skip_non_finite_steps is 0"
    scale.can_fall = False
    policy = BadSteps(TrainingConfig(precision="float16"), scale)
    assert policy.why_skip(1, 1.0, float("inf"), 5) == "the gradient's norm is inf at a loss of 1.0000"
    assert policy.too_many == "training.skip_non_finite_steps is 0"


def test_a_damaged_scale_is_named(tmp_path: Path) -> None:
    content = json.loads(bad_steps.dumps(BadSteps(TrainingConfig()).history))
    assert "loss_scale" not in content
    for wrong, message in (([1.0], "loss_scale has 1 numbers; it must have 3 or none"), (["x"], "loss_scale")):
        (tmp_path / bad_steps.FILE).write_text(json.dumps({**content, "loss_scale": wrong}))
        with pytest.raises(CheckpointError, match=message):
            bad_steps.load(tmp_path)


def test_the_first_scale_counts_a_micro_batch() -> None:
    assert first_loss_scale(1)["initial_loss_scale"] == 2.0**16
    assert first_loss_scale(8 * 2048) == {"initial_loss_scale": 4.0, "min_loss_scale": 2.0**-14}
