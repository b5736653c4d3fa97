"""What a run writes to events.jsonl, and that it stops before its job's time is up."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from steel_megatron import events
from steel_megatron.config import DataConfig, RunConfig
from steel_megatron.train.callbacks import events as log_module
from steel_megatron.train.callbacks.events import EventLog
from steel_megatron.train.loop import TrainingSummary, pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, write_corpus


def facts(run: RunConfig) -> list[tuple[Any, ...]]:
    """Event, step and reason of each line but those of progress."""
    found = events.read(Path(run.checkpoint.directory))
    return [(e["event"], e["step"], e.get("reason")) for e in found if e["event"] != "progress"]


def with_a_time_limit(run: RunConfig, seconds: float) -> TrainingSummary:
    if os.environ["RANK"] == "0":  # the others do not know it
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + seconds))
    return pretrain(run)


@pytest.mark.slow
def test_a_run_writes_its_events_and_stops_in_time(tmp_path: Path) -> None:
    data = DataConfig(train=[write_corpus(tmp_path / "c", 60, 0)])
    run = make_run(data, tmp_path / "run", LAYOUTS["dp2"], stop_after_step=2)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2))
    first, _ = run_distributed(pretrain, 2, run)
    assert not first.stopped
    expected: list[tuple[Any, ...]] = [("start", 0, None), ("save", 2, None), ("stop", 2, "stop_after_step")]
    assert facts(run) == expected
    rest = dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))
    stopped = run_distributed(with_a_time_limit, 2, rest, 0)
    assert [summary.stopped for summary in stopped] == [True, True] and stopped[0].step == 3
    expected += [("resume", 2, None), ("save", 3, None), ("stop", 3, "time limit")]
    assert facts(run) == expected
    finished = run_distributed(with_a_time_limit, 2, rest, 3600)
    assert [summary.finished for summary in finished] == [True, True]
    expected += [("resume", 3, None), ("save", 4, None), ("save", 6, None), ("stop", 6, "finished")]
    assert facts(run) == expected

    saves = [event for event in events.read(tmp_path / "run") if event["event"] == "save"]
    assert all(0 < event["seconds"] < 60 and 0 < event["step_seconds"] < 60 for event in saves)
    (last,) = [event for event in events.read(tmp_path / "run") if event.get("reason") == "finished"]
    assert last["loss"] == finished[0].loss and last["tokens_per_second"] > 0
    assert saves[2]["step_seconds"] < last["step_seconds"]  # of step 4, in a launch that went on to 6
    assert [e["step"] for e in events.read(tmp_path / "run") if e["event"] == "progress"] == [1, 3, 4]


def test_a_save_that_ends_later_has_the_seconds_of_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 10 s each; the save of step 2 ends after step 4."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: float(next(clock)))
    run = make_run(DataConfig(), tmp_path, LAYOUTS["dp2"])
    topology = SimpleNamespace(launch=SimpleNamespace(world_size=2), describe=lambda: "DP2")
    view: Any = SimpleNamespace(is_rank0=True, config=run, topology=topology, step=0)
    log = EventLog(lambda: 7.0)
    log.start(view)
    for step in range(1, 5):
        log.before_step(view)
        log.after_step(view, cast(Any, SimpleNamespace(step=step, tokens=100, loss=float("nan"))))
        view.step = step
    log.after_save(view, tmp_path / "step_00000002")
    found = [event for event in events.read(tmp_path) if event["event"] in ("progress", "save")]
    assert log.longest_step == 10.0
    assert [(event["event"], event["step_seconds"]) for event in found] == [
        ("progress", 10.0), ("progress", 30.0), ("save", 20.0),
    ]  # fmt: skip
    assert found[2]["step"] == 2 and found[2]["seconds"] == 7.0
    assert found[2]["tokens_per_second"] == 10.0 and "loss" not in found[2]  # it was no number
