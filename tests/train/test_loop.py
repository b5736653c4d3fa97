"""A whole run on a small corpus: training, validation, stops, resumes, and what makes it refuse or stop."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import SteelError, TrainingError
from steel_megatron.report import plot_loss, read_scalars
from steel_megatron.train.loop import TrainingSummary, pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, small_run

ALONE = ParallelConfig()


def write_corpus(prefix: Path, documents: int, seed: int) -> str:
    """Documents that count up, so that there is something to learn."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            start, length = random.integers(0, 90), random.integers(5, 60)
            writer.add_document((start + np.arange(length)) % 90)
        writer.finalize({})
    return str(prefix)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpora")
    train, validation = write_corpus(folder / "train", 60, 0), write_corpus(folder / "valid", 12, 1)
    return DataConfig(train=[train], validation=[validation])


def make_run(data: DataConfig, directory: Path, parallel: ParallelConfig = ALONE, **training: Any) -> RunConfig:
    base = small_run(parallel, str(directory), num_layers=2)
    settings = {"train_steps": 6, "eval_interval": 3, "eval_steps": 2, "stop_after_step": None}
    return dataclasses.replace(base, data=data, training=dataclasses.replace(base.training, **{**settings, **training}))


def outcome(run: RunConfig) -> TrainingSummary | str:
    """The run's summary, or the message with which it was refused."""
    try:
        return pretrain(run)
    except SteelError as error:
        return str(error)


def one(run: RunConfig) -> Any:
    return run_distributed(outcome, 1, run)[0]


@pytest.fixture(scope="module")
def finished(corpora: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainingSummary]:
    """Six steps in one go."""
    run = make_run(corpora, tmp_path_factory.mktemp("finished"))
    return run, one(run)


def losses(run: RunConfig) -> list[tuple[int, float]]:
    return read_scalars(run.tensorboard_dir)["train/loss"]


def test_a_run_leaves_what_it_promises(finished: tuple[RunConfig, TrainingSummary], tmp_path: Path) -> None:
    run, summary = finished
    assert summary.finished and summary.step == 6 and summary.checkpoint.name == "step_00000006"
    scalars = read_scalars(run.tensorboard_dir)
    assert set(scalars) == {
        *("train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_second", "memory/gib", "validation/loss")
    }
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["validation/loss"]] == [3, 6]
    assert scalars["train/loss"][-1][1] == pytest.approx(summary.loss, rel=1e-6)
    assert scalars["validation/loss"][-1][1] == pytest.approx(summary.validation_loss, rel=1e-6)
    assert scalars["train/lr"][1][1] == pytest.approx(run.optimizer.lr)  # two steps of warmup
    assert (Path(run.checkpoint.directory) / "run.yaml").is_file()
    plot_loss(scalars, tmp_path / "loss.png", unigram_entropy=4.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("after", ["dp2", "tp2", "pp2"])
def test_stopped_and_resumed_under_another_layout(
    finished: tuple[RunConfig, TrainingSummary], tmp_path: Path, after: str
) -> None:
    reference, summary = finished
    half = make_run(reference.data, tmp_path, stop_after_step=3)
    first = one(half)
    assert not first.finished and first.step == 3
    rest = run_distributed(outcome, 2, make_run(reference.data, tmp_path, LAYOUTS[after]))[0]
    assert rest.finished and rest.validation_loss == pytest.approx(summary.validation_loss, rel=1e-5)
    together = losses(half)
    assert [step for step, _ in together] == [1, 2, 3, 4, 5, 6]
    for (step, ours), (_, theirs) in zip(together, losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"


def test_a_finished_run_has_nothing_to_do(finished: tuple[RunConfig, TrainingSummary]) -> None:
    again = one(finished[0])
    assert again.finished and again.loss is None and again.checkpoint == finished[1].checkpoint
    stopped = dataclasses.replace(finished[0].training, stop_after_step=4)
    for run, limit in (
        (finished[0], "training.train_steps is 6"),
        (dataclasses.replace(finished[0], training=stopped), "training.stop_after_step is 4"),
    ):
        said = run_distributed(told, 1, run)[0]
        assert said[-1] == f"nothing is left to do: step 6 is done, and {limit}"


def told(run: RunConfig) -> list[str]:
    """What a run logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("steel_megatron")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    pretrain(run)
    return lines


def test_other_data_cannot_be_resumed_on(finished: tuple[RunConfig, TrainingSummary], tmp_path: Path) -> None:
    other = DataConfig(train=[write_corpus(tmp_path / "other", 60, 5)])
    message = one(dataclasses.replace(finished[0], data=other))
    assert f"{tmp_path}/other is not in the ledger" in message and "steel-megatron data append" in message


def test_a_folder_with_checkpoints_is_not_begun_anew(finished: tuple[RunConfig, TrainingSummary]) -> None:
    run = finished[0]
    fresh = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, resume=False))
    assert "checkpoint.resume is false" in one(fresh)


@pytest.mark.slow
def test_damaged_checkpoints_are_not_trained_over(corpora: DataConfig, tmp_path: Path) -> None:
    run = make_run(corpora, tmp_path, train_steps=1)
    saved = one(run).checkpoint
    (saved / ".metadata").unlink()
    assert "is whole, so there is nothing to resume from" in one(run)
    assert saved.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("keep_last", "left"), [(2, [5, 6]), (5, [2, 3, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_old_checkpoints_are_removed_when_asked(
    corpora: DataConfig, tmp_path: Path, keep_last: int, left: list[int]
) -> None:
    run = make_run(corpora, tmp_path)
    kept = dataclasses.replace(run.checkpoint, save_interval=1, keep_last=keep_last)
    one(dataclasses.replace(run, checkpoint=kept))
    assert sorted(path.name for path in run.checkpoints_dir.glob("step_*")) == [f"step_{step:08d}" for step in left]


@pytest.mark.slow
def test_damaged_checkpoints_do_not_count_as_kept(corpora: DataConfig, tmp_path: Path) -> None:
    run = make_run(corpora, tmp_path)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2, keep_last=1))
    half = dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=2))
    one(half)
    damaged = run.checkpoints_dir / "step_00000005"
    damaged.mkdir()
    summary = one(dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=4)))
    assert summary.checkpoint.name == "step_00000004" and summary.checkpoint.is_dir()
    assert one(run).step == 6


def weights_of(paths: list[Path]) -> list[dict[str, Any]]:
    from steel_megatron.hf.mapping import rules
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ALONE)
    infos = [checkpoint.read_info(path) for path in paths]
    return [checkpoint.read_tensors(info, [rule.key for rule in rules(info.model)]) for info in infos]


def test_weights_of_another_run_can_be_the_start(finished: tuple[RunConfig, TrainingSummary], tmp_path: Path) -> None:
    run, summary = finished
    begun = make_run(run.data, tmp_path, train_steps=1, stop_after_step=1)
    begun = dataclasses.replace(
        begun, checkpoint=dataclasses.replace(begun.checkpoint, init_from=str(summary.checkpoint))
    )
    warm = one(begun)
    assert warm.loss < losses(run)[0][1] - 0.3  # far below a fresh model's first loss
    # The optimizer has weights of its own in bfloat16 runs. With a rate of 0 a step gives back what it began with.
    still = dataclasses.replace(
        begun,
        optimizer=dataclasses.replace(begun.optimizer, lr=0.0),
        training=dataclasses.replace(begun.training, precision="bfloat16"),
        checkpoint=dataclasses.replace(begun.checkpoint, directory=str(tmp_path / "still")),
    )
    after = one(still).checkpoint
    theirs, ours = run_distributed(weights_of, 1, [summary.checkpoint, after])[0]
    for name, weight in theirs.items():
        assert weight.to(ours[name].dtype).equal(ours[name]), name


def interrupted(run: RunConfig, at_step: int, on_rank: int) -> TrainingSummary:
    """A run in which a process and its children get SIGTERM during a step, as launchers send it."""
    os.setpgrp()
    from steel_megatron.train.engine import Engine

    plain_step = Engine.step

    def step(engine: Engine, batches: Any) -> Any:
        if engine.step_number + 1 == at_step and int(os.environ["RANK"]) == on_rank:
            os.killpg(os.getpgrp(), signal.SIGTERM)
        return plain_step(engine, batches)

    Engine.step = step  # type: ignore[method-assign]
    try:
        return pretrain(run)
    finally:
        Engine.step = plain_step  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_preempted_job_saves_and_goes_on(finished: tuple[RunConfig, TrainingSummary], tmp_path: Path) -> None:
    run = make_run(finished[0].data, tmp_path, LAYOUTS["dp2"])
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2))
    summaries = run_distributed(interrupted, 2, run, 3, 1)  # after a first save
    assert [summary.step for summary in summaries] == [3, 3]
    assert summaries[0].checkpoint.name == "step_00000003"
    assert run_distributed(outcome, 2, run)[0].finished
    for (step, ours), (_, theirs) in zip(losses(run), losses(finished[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"


POISONS = {
    "NaN weight": ("the loss is nan", "the weight decoder.layers"),
    "infinite loss": ("the loss is inf", "the sum of the losses"),
    "NaN gradient": ("the gradient's norm is nan", "the gradient of decoder.layers"),
    "infinite gradient": ("the gradient's norm is inf", "the gradient of decoder.layers"),
}
"""What a step's message says of the number and of where it came from."""


def poisoned(run: RunConfig) -> dict[str, tuple[str, bool]]:
    """One step of an engine for each of POISONS, which all but the infinite loss are put into the second layer.

    Returns:
        the message, and whether the weights are what they were.
    """
    import torch

    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine
    from tests.train.small_run import own_batches

    found = {}
    for poison in POISONS:
        engine = Engine(run, topology)
        value = float("nan" if poison.startswith("NaN") else "inf")
        weights = [layer.mlp.experts.up for layer in engine.stage.decoder.layers if layer.layer_number == 2]
        for weight in weights:
            if poison.endswith("gradient"):
                weight.register_hook(lambda gradient, value=value: torch.full_like(gradient, value))
            elif poison == "NaN weight":
                weight.data[0, 0, 0, 0] = value
        if poison == "infinite loss" and engine.stage.post_process:
            # Each label's loss is about 1e37, which float32 holds, and a micro batch's sum is not.
            engine.stage.output_layer.weight.data.mul_(3e37)
        before = {name: parameter.detach().clone() for name, parameter in engine.stage.named_parameters()}
        message = "no error"
        try:
            engine.step(own_batches(run, 0, topology))
        except TrainingError as error:
            message = str(error)
        after = dict(engine.stage.named_parameters())
        same = all(torch.equal(after[name], old) for name, old in before.items() if old.isfinite().all())
        found[poison] = message, same and engine.step_number == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_what_is_not_finite_stops_before_the_update(layout: str) -> None:
    parallel, processes = (ALONE, 1) if layout == "alone" else (LAYOUTS[layout], 2)
    for found in run_distributed(poisoned, processes, small_run(parallel)):
        for poison, (what, where) in POISONS.items():
            message, unchanged = found[poison]
            assert unchanged, poison
            assert message.startswith(f"step 1: {what}") and where in message, message
            assert poison == "infinite loss" or ("mlp.experts.up" in message and "layer 2" in message), message


def overflowing(run: RunConfig) -> str:
    """The message of a step whose second layer's feed-forward gives infinities from finite inputs and weights."""
    import torch

    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine
    from tests.train.small_run import own_batches

    engine = Engine(run, topology)
    for layer in engine.stage.decoder.layers:
        if layer.layer_number == 2:
            with torch.no_grad():
                layer.mlp.experts.down.fill_(1e30)
    try:
        engine.step(own_batches(run, 0, topology))
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes"), [("dp2", 2), ("pp2", 2), ("tp2", 2)])
def test_the_layer_that_overflows_is_named(layout: str, processes: int) -> None:
    for message in run_distributed(overflowing, processes, small_run(LAYOUTS[layout])):
        assert "the mlp of layer 2" in message and "from finite inputs" in message and "token" in message


@pytest.mark.slow
def test_the_non_causal_loss_is_called_so(corpora: DataConfig, tmp_path: Path) -> None:
    run = make_run(corpora, tmp_path, train_steps=2)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, routing_mode="sequence"))
    one(run)
    scalars = read_scalars(run.tensorboard_dir)
    assert "train/loss (non-causal)" in scalars and "validation/loss (non-causal)" in scalars
    assert not {"train/loss", "validation/loss"} & set(scalars)


@pytest.mark.slow
def test_bfloat16_follows_float32(finished: tuple[RunConfig, TrainingSummary], tmp_path: Path) -> None:
    run = make_run(finished[0].data, tmp_path, LAYOUTS["tp2"], precision="bfloat16")
    summary = run_distributed(outcome, 2, run)[0]
    assert summary.validation_loss == pytest.approx(finished[1].validation_loss, rel=0.03)


def test_a_log_that_cannot_be_written_is_said(corpora: DataConfig, tmp_path: Path) -> None:
    run = make_run(corpora, tmp_path / "run", LAYOUTS["dp2"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("not a folder")
    messages = run_distributed(outcome, 2, run)
    assert "cannot write" in messages[0] and "process 0 failed" in messages[1]


def without_curves(run: RunConfig) -> list[str]:
    """A run whose TensorBoard log cannot be written to; returns the lines it logs."""
    import logging

    from torch.utils.tensorboard import SummaryWriter

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    SummaryWriter.add_scalar = fail  # type: ignore[method-assign]
    logger = logging.getLogger("steel_megatron")
    logger.setLevel(logging.INFO)
    logger.addHandler(Lines())
    assert pretrain(run).finished
    return lines


@pytest.mark.slow
def test_a_run_goes_on_and_speaks_on_without_curves(corpora: DataConfig, tmp_path: Path) -> None:
    lines = run_distributed(without_curves, 1, make_run(corpora, tmp_path))[0]
    assert sum("no more TensorBoard scalars" in line for line in lines) == 1
    assert [line.split()[1] for line in lines if " of 6 " in line] == ["1", "2", "3", "4", "5", "6"]
    assert sum("validation loss" in line for line in lines) == 2


@pytest.mark.slow
def test_runs_that_cannot_begin(corpora: DataConfig, tmp_path: Path) -> None:
    assert "data.train is empty" in one(make_run(DataConfig(), tmp_path))
    assert "nowhere" in one(make_run(DataConfig(train=["nowhere"]), tmp_path))
    long = make_run(corpora, tmp_path)
    long = dataclasses.replace(long, model=dataclasses.replace(long.model, sequence_length=5000))
    assert "5001" in one(long) or "5,001" in one(long)
    small = make_run(corpora, tmp_path)
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=50))
    assert "holds token id" in one(small)
    assert not list(tmp_path.iterdir())


def test_an_initial_checkpoint_that_is_not_there(corpora: DataConfig, tmp_path: Path) -> None:
    run = make_run(corpora, tmp_path)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, init_from="nowhere"))
    assert one(run).startswith("there is no folder nowhere; name a run's folder")


def warnings_of(run: RunConfig) -> list[str]:
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("steel_megatron").addHandler(handler)
    pretrain(run)
    return told


def test_doubtful_settings_are_told_on_one_rank(corpora: DataConfig, tmp_path: Path) -> None:
    few = dataclasses.replace(corpora, validation={"zh": [write_corpus(tmp_path / "few", 2, 3)]})
    run = make_run(few, tmp_path / "run", train_steps=2, eval_interval=3)
    first, other = run_distributed(warnings_of, 2, run)
    assert other == []
    interval, size = (line for line in first if "eval_interval" in line or "data.validation" in line)
    assert interval == "training.eval_interval = 3 is over train_steps = 2, so the run is validated only at the end"
    assert (
        size.startswith("data.validation.zh has ")
        and f"fewer than one batch of {run.training.global_batch_size}" in size
    )


def test_a_run_s_tokenizer_is_checked_when_it_starts(corpora: DataConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(corpora, tokenizer_path=str(tmp_path / "nowhere"))
    message = one(make_run(data, tmp_path / "run"))
    assert message.startswith(f"data.tokenizer_path is {tmp_path}/nowhere: ") and message.endswith("does not exist")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
