"""Saves that training does not wait for, and what is left of them when a run is killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError, SteelError
from steel_megatron.train.callbacks import Callback, RunView
from steel_megatron.train.engine import StepResult
from steel_megatron.train.loop import TrainingSummary, pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, one, outcome, write_corpus

ALONE = ParallelConfig()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(train=[write_corpus(tmp_path_factory.mktemp("corpora") / "train", 60, 0)])


def saving_run(data: DataConfig, directory: Path, parallel: ParallelConfig = ALONE, **checkpoint: Any) -> RunConfig:
    """Six steps, with a checkpoint after every second one."""
    run = make_run(data, directory, parallel)
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2, **checkpoint))


def when_tensors_are_synced(step: int, act: Callable[[Path], None]) -> Any:
    """Calls ``act`` with each of a checkpoint's files before it is synced, in the thread that wrote it."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".distcp") and f".step_{step:08d}.partial" in path:
            act(Path(path))
        sync(descriptor)

    return mock.patch.object(os, "fsync", fsync)


def killed_in_a_save(run: RunConfig, notes: Path) -> None:
    """Trains until the tensors of step 4 are written, notes the processes that are there, and kills itself."""

    def die(_: Path) -> None:
        notes.write_text(json.dumps([child.cmdline() for child in psutil.Process().children(recursive=True)]))
        os.kill(os.getpid(), signal.SIGKILL)

    with when_tensors_are_synced(4, die):
        pretrain(run)


def hashes(paths: list[Path]) -> list[dict[str, str]]:
    """Of every tensor of checkpoints."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ALONE)
    found = []
    for path in paths:
        checkpoint.verify(path)
        info = checkpoint.read_info(path)
        tensors = checkpoint.read_tensors(info, checkpoint.tensor_names(info))
        found.append({key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()})
    return found


def steps(run: RunConfig, *numbers: int) -> list[Path]:
    return [run.checkpoints_dir / f"step_{number:08d}" for number in numbers]


def test_a_kill_in_a_save_leaves_nothing_and_the_run_resumes_at_once(corpora: DataConfig, tmp_path: Path) -> None:
    run, reference = saving_run(corpora, tmp_path / "run"), saving_run(corpora, tmp_path / "other", async_save=False)
    notes = tmp_path / "children"
    with pytest.raises(AssertionError, match="rank 0 died with exit code -9"):
        run_distributed(killed_in_a_save, 1, run, notes)
    assert json.loads(notes.read_text()) == []
    assert sorted(path.name for path in run.checkpoints_dir.iterdir()) == [".step_00000004.partial", "step_00000002"]
    resumed, uninterrupted = one(run), one(reference)  # the lock is free now
    assert resumed.losses == uninterrupted.losses[2:]
    assert sorted(run.checkpoints_dir.iterdir()) == steps(run, 2, 4, 6)
    of_both = run_distributed(hashes, 1, [*steps(run, 2, 4, 6), *steps(reference, 2, 4, 6)])[0]
    assert of_both[:3] == of_both[3:]
    assert len(of_both[0]) > 20 and of_both[0]["optimizer.state.exp_avg.output_layer.weight"]


def one_of_two_is_killed_in_a_save(run: RunConfig, notes: Path) -> None:
    """Rank 1 kills itself while its tensors of step 4 are written; rank 0 notes what it says, and how it ends."""

    def die(_: Path) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with when_tensors_are_synced(4, die):
        notes.write_text(str(outcome(run)))


@pytest.mark.slow
def test_who_survives_a_kill_in_a_save_says_who_was_lost(corpora: DataConfig, tmp_path: Path) -> None:
    run, notes = saving_run(corpora, tmp_path / "run", LAYOUTS["dp2"]), tmp_path / "said"
    with pytest.raises(AssertionError, match="rank 1 died with exit code -9"):
        run_distributed(one_of_two_is_killed_in_a_save, 2, run, notes, timeout=50)  # the time limit of gloo is 60 s
    assert re.fullmatch(
        r"lost rank 1 \(process \d+ on \S+\) in step [56], with step_00000004 being saved; it was killed or has "
        r"crashed, see its own output\. The same command resumes from the newest checkpoint",
        notes.read_text(),
    )
    assert all(summary.finished for summary in run_distributed(outcome, 2, run))


@dataclasses.dataclass
class Story(Callback):
    """What happens in a run, in order; the save of step 2 stays in its last moment until ``opens`` is over."""

    opens: str
    poison: bool = False
    raises: bool = False
    disk_is_full: bool = False
    events: list[str] = dataclasses.field(default_factory=list)
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)

    def hold(self, _: Path) -> None:
        self.gate.wait(5)
        self.events.append("written 2")
        if self.disk_is_full and threading.current_thread() is not threading.main_thread():
            raise OSError(28, "No space left on device")

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.opens:
            self.gate.set()

    def before_step(self, run: RunView) -> None:
        if run.step == 2 and self.poison:
            next(run.model.parameters()).data.fill_(float("nan"))
        self.note(f"before step {run.step + 1}")
        if run.step == 2 and self.raises:
            raise KeyError("an error of this process alone")

    def after_step(self, run: RunView, result: StepResult) -> None:
        self.note(f"step {result.step}")

    def after_save(self, run: RunView, path: Path) -> None:
        self.note(f"saved {int(path.name[-8:])}")

    def tell(self, run: RunConfig) -> tuple[list[str], str, list[str]]:
        """The events, the error, and what is in the folder of checkpoints."""
        error = ""
        with when_tensors_are_synced(2, self.hold):
            try:
                pretrain(run, [self])
            except (SteelError, KeyError) as raised:
                error = f"{type(raised).__name__}: {raised}"
        left = sorted(path.name for path in run.checkpoints_dir.iterdir())
        return [event for event in self.events if not event.startswith("before")], error, left


def stories(runs: list[RunConfig]) -> list[tuple[list[str], str, list[str]]]:
    told = [
        Story(opens="step 4").tell(runs[0]),
        Story(opens="before step 3", disk_is_full=True).tell(runs[1]),
        Story(opens="before step 3", poison=True).tell(runs[2]),
        Story(opens="before step 3", raises=True).tell(runs[3]),
    ]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")] == []
    return told


def test_training_goes_on_while_a_checkpoint_is_written(corpora: DataConfig, tmp_path: Path) -> None:
    runs = [saving_run(corpora, tmp_path / str(number)) for number in range(4)]
    slow, full, poisoned, broken = run_distributed(stories, 1, runs)[0]

    events = [event for event in slow[0] if event != "written 2"]
    assert slow[0].index("step 4") < slow[0].index("written 2") < slow[0].index("saved 2")
    # The next save waits for the one under way, and the end of the run for the last one.
    assert events[:5] == ["step 1", "step 2", "step 3", "step 4", "saved 2"]
    assert sorted(events[5:]) == ["saved 4", "saved 6", "step 5", "step 6"]
    assert events.index("saved 4") < events.index("saved 6") and events[-1] == "saved 6"
    assert slow[1:] == ("", ["step_00000002", "step_00000004", "step_00000006"])

    assert full[1] == (
        f"CheckpointError: could not write the checkpoint {runs[1].checkpoints_dir}/step_00000002: [Errno 28] No space "
        "left on device; earlier ones are untouched"
    )
    assert "step 3" in full[0] and "saved 2" not in full[0] and full[2] == []

    # An error that all processes have finishes the save, of what was there when it began.
    assert poisoned[1].startswith("TrainingError: step 3: the loss is nan")
    assert poisoned[0][-1] == "saved 2" and "step 3" not in poisoned[0] and poisoned[2] == ["step_00000002"]
    of_both = run_distributed(hashes, 1, [*steps(runs[0], 2), *steps(runs[2], 2)])[0]
    assert of_both[0] == of_both[1]

    # Another error does not: a process that is alone with it cannot wait for the others.
    assert "an error of this process alone" in broken[1] and broken[2] == [".step_00000002.partial"]


class Poison(Callback):
    """Puts a number that is not finite into the optimizer's state after step 4."""

    def after_step(self, run: RunView, result: StepResult) -> None:
        if result.step == 4:
            next(iter(run.engine.optimizer.chained_optimizers[0].optimizer.state.values()))["exp_avg"][3] = float("nan")


def faults(runs: list[RunConfig]) -> list[str]:
    """The messages of runs that keep one checkpoint and whose second one cannot be trusted."""

    def damage(file: Path) -> None:
        if runs[1].checkpoints_dir in file.parents:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

    said = []
    for run, callbacks in zip(runs, ([Poison()], []), strict=True):
        with when_tensors_are_synced(4, damage), pytest.raises(CheckpointError) as raised:
            pretrain(run, callbacks)
        said.append(str(raised.value))
    return said


def test_the_last_good_checkpoint_outlives_one_that_cannot_be_trusted(corpora: DataConfig, tmp_path: Path) -> None:
    runs = [saving_run(corpora, tmp_path / str(number), keep_last=1) for number in range(2)]
    poisoned, damaged = run_distributed(faults, 1, runs)[0]
    assert re.fullmatch(
        r"no checkpoint of step 4 is made: optimizer\.state\.exp_avg\.\S+ \(the part at \[[0-9, ]+\]\) holds 1 of "
        r"[0-9,]+ numbers that are not finite; earlier ones are untouched",
        poisoned,
    )
    assert re.search(r"step_00000004: /.*/__0_[01]\.distcp reads back other than it was written; earlier", damaged)
    for run in runs:
        assert list(run.checkpoints_dir.iterdir()) == steps(run, 2)
    assert one(runs[0]).finished  # the same command resumes from it
    assert list(runs[0].checkpoints_dir.iterdir()) == steps(runs[0], 6)


def norms(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Of all tensors: as the manifest says, and as they are."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ALONE)
    info = checkpoint.read_info(path)
    tensors = checkpoint.read_tensors(
        info, [key for key in checkpoint.tensor_names(info) if not key.startswith("random.")]
    )
    said = json.loads((path / "steel.json").read_text())["norms"]
    return said, {key: float(tensor.double().norm()) for key, tensor in tensors.items()}


def go_back(runs: list[RunConfig]) -> list[TrainingSummary | str]:
    return [outcome(run) for run in runs]


def test_a_run_goes_back_on_purpose_and_loses_nothing(corpora: DataConfig, tmp_path: Path) -> None:
    run = saving_run(corpora, tmp_path)
    back, missing = (
        dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, resume_from=step)) for step in (2, 3)
    )
    short = dataclasses.replace(back, training=dataclasses.replace(back.training, stop_after_step=4))
    straight, refused, half, rest, again = run_distributed(go_back, 1, [run, missing, short, back, back])[0]
    assert refused == (
        f"checkpoint.resume_from is 3, but {run.checkpoints_dir} has checkpoints of these steps: 2, 4, 6"
    )
    assert half.losses == straight.losses[2:4] and rest.losses == straight.losses[4:] and len(again.losses) == 0
    assert sorted(run.checkpoints_dir.iterdir()) == [run.checkpoints_dir / "set_aside", *steps(run, 2, 4, 6)]
    aside = run.checkpoints_dir / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000004", "step_00000006"]
    # Back again, from a checkpoint that was saved after going back: what has the same name stays as well.
    later = dataclasses.replace(back, checkpoint=dataclasses.replace(back.checkpoint, resume_from=4))
    assert one(later).losses == straight.losses[4:]
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000004", "step_00000006", "step_00000006.1"]
    said, computed = run_distributed(norms, 1, steps(run, 6)[0])[0]
    bytes_of_generators = {key: said.pop(key) for key in list(said) if key.startswith("random.")}
    assert set(bytes_of_generators.values()) == {0.0} and said == pytest.approx(computed, rel=1e-5)
