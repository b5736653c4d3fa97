"""A run syncs with its ledger: what it applies, what it defers, and which past it refuses."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from steel_megatron.data.ledger import ledger as ledger_module
from steel_megatron.data.ledger.changes import add, cancel, released, remove, reweight, set_mixture, synced
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import Ledger, dumps, edit
from steel_megatron.data.ledger.records import StepSize, Unchanged
from steel_megatron.data.ledger.session import LedgerSession, prune_cache
from steel_megatron.data.ledger.sync import (
    RunPosition,
    check_past,
    defer,
    defer_file,
    first_difference,
    resume,
    run_position,
    start,
)
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from tests.data.corpora import write
from tests.data.ledgers import corpus, located, two
from tests.train.test_loop import make_run


def position(consumed: int, next_sync: int, end: int = 100) -> RunPosition:
    return RunPosition(consumed // 4, consumed, next_sync, end, 4)


def own() -> History:
    """A run that read from 0 to 20 and syncs next at 40; changes are planned at 30 and 60."""
    ledger = two().then(reweight, {"a": 2}, at=30).then(add, [corpus("late", 30, "zh")], at=60)
    return start(start(ledger, position(0, 20)), position(20, 40))


def test_positions_follow_the_settings() -> None:
    def at(step: int, stop: int | None = None, *, ends: bool = False, steps: int = 10) -> RunPosition:
        training = TrainingConfig(train_steps=steps, stop_after_step=stop, global_batch_size=8)
        run = dataclasses.replace(run_config, training=training, checkpoint=CheckpointConfig(save_interval=4))
        return run_position(run, step, 100 + 8 * step, ends=ends)

    from steel_megatron.config import ParallelConfig
    from tests.train.small_run import small_run

    run_config: RunConfig = small_run(ParallelConfig())
    assert at(0) == RunPosition(0, 100, 132, 180, 8)
    assert [at(step).next_sync for step in (3, 4, 7, 8, 10)] == [132, 164, 164, 180, 180]
    assert [at(step, 6).next_sync for step in (4, 6, 8)] == [148, 148, 164]
    assert at(4, ends=True).next_sync == 132 and at(5).end == 180
    with pytest.raises(ConfigError, match=r"train_steps is 3, but the run has done 4 steps already; raise it"):
        at(4, steps=3)


def test_changes_are_applied_at_a_sync() -> None:
    ledger = own().then(add, [corpus("new", 10, "en")]).then(remove, ["late"], at=80)
    taken = resume(ledger, own(), position(40, 60))
    assert [event.at for event in taken.events] == [0, 30, 60, 40, 80]
    assert (taken.last_synced_sample, taken.next_sync_sample) == (40, 60) and taken.differs_from(own())
    same = resume(own(), own(), position(40, 60))
    assert not same.differs_from(own()) and same.next_sync_sample == 60
    with pytest.raises(DataError, match="has 40 samples, and 100 are needed"):
        resume(own().then(remove, ["a", "b"]).then(cancel, 60), own(), position(40, 60))
    with pytest.raises(DataError, match="it has read a 2 times at sample 30, where there was none; this differs"):
        resume(own(), own().then(released).then(cancel, 30), position(40, 60))


def events(ledger: History) -> list[tuple[int | None, list[str], tuple[str, ...], list[str]]]:
    return [
        (event.at, [ledger.corpora[added.corpus].name for added in event.add], event.remove, list(event.epochs))
        for event in ledger.events
    ]


def test_what_cannot_be_applied_is_deferred(caplog: pytest.LogCaptureFixture) -> None:
    pending = own().then(add, [corpus("new", 10, "en")])
    waiting = defer(pending, own(), position(40, 80))
    assert waiting.events == pending.events and (waiting.last_synced_sample, waiting.next_sync_sample) == (40, 80)
    # Planned before the next sync: it cannot apply there.
    planned = own().then(add, [corpus("soon", 9, "en")], at=50).then(remove, ["b"], at=80)
    waiting = defer(planned, own(), position(40, 80))
    assert events(waiting)[-3:] == [(60, ["late"], (), []), (None, ["soon"], (), []), (80, [], ("b",), [])]
    assert located(waiting, 0, 80) == located(own(), 0, 80)
    # Cancelled, but read all the same.
    cancelled = own().then(cancel, 60).then(add, [corpus("other", 30, "en")], at=70)
    waiting = defer(cancelled, own(), position(40, 80))
    assert events(waiting)[-2:] == [(60, ["late"], (), []), (None, ["other"], (), [])]
    assert located(waiting, 0, 80) == located(own(), 0, 80)
    assert "add late (1 times) at sample 60 was cancelled too late: the run continues with it" in caplog.text
    # Deferred changes keep the order in which they would have applied.
    mixed = own().then(set_mixture, {"zh": 1, "en": 3}, at=50).then(set_mixture, {"zh": 1, "en": 1})
    waiting = defer(mixed, own(), position(40, 80))
    assert [event.mixture for event in waiting.events if event.mixture is not Unchanged.MIXTURE] == [
        {"zh": 1, "en": 1},
        {"zh": 1, "en": 3},
    ]
    # Nobody may change what was read, and the file is as the run knows it again.
    forged = dataclasses.replace(own(), seed=9)
    assert defer(forged, own(), position(40, 80)) == own().then(synced, 40, 80)


def test_a_stop_releases_what_was_not_read() -> None:
    ledger = own().then(add, [corpus("new", 10, "en")])
    stopped = defer(ledger, own(), position(24, 24))
    assert stopped.events == ledger.events and (stopped.last_synced_sample, stopped.next_sync_sample) == (24, 24)


def test_what_does_not_fit_any_more_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.json"
    changed = (
        own().then(cancel, 60).then(add, [corpus("late", 30, "zh")], at=90)
    )  # in at 60 by what is read, and at 90 again
    Ledger(changed).save(path)
    assert defer_file(path, own(), position(40, 80)).history == Ledger.load(path).history == own().then(synced, 40, 80)
    assert Ledger.load(tmp_path / "ledger.refused-40.json").history == changed
    assert "its changes do not fit and are saved in" in caplog.text
    # Another ledger, in which the run's third corpus has the number of another.
    with pytest.raises(DataError, match="its corpora are not those that the run reads"):
        defer(two().then(add, [corpus("other", 30, "zh")], at=60), own(), position(40, 80))


class Alone:
    """A run of one process."""

    def raise_if_any_rank_failed(self, action: Callable[[], Any]) -> Any:
        return action()

    on_rank0 = raise_if_any_rank_failed

    def first_process_bytes(self, content: bytes) -> bytes:
        return content


def test_a_session_reads_what_fits_and_defers_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, wrong = (write(tmp_path / name, [[n] * 241]) for name, n in (("a", 1), ("b", 2), ("wrong", 300)))
    run, path = make_run(DataConfig(train=[first]), tmp_path / "run", train_steps=8), tmp_path / "run" / "ledger.json"

    def marks() -> tuple[int, int]:
        return (history := Ledger.load(path).history).last_synced_sample, history.next_sync_sample

    def append(prefix: str) -> None:
        with edit(path) as file:
            file.ledger = file.ledger.append([prefix])

    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2))
    session = LedgerSession(run, Alone())
    assert session.ledger is None and not path.exists()
    session.start()
    before = session.samples
    assert marks() == (0, 16) and session.end == 64 and before is not None
    session.sync(2, 16)
    assert session.samples is before and marks() == (16, 32)  # nothing is opened or read ahead again
    append(second)
    session.sync(4, 32)
    samples = session.samples
    assert samples is not None and samples is not before and {1, 2} == {samples.sample(n)[0] for n in range(32, 44)}
    append(wrong)
    session.sync(6, 48)
    assert session.samples is samples and marks() == (48, 64)
    assert session.ledger == samples.ledger != Ledger.load(path)
    assert "cannot be applied at sample 48" in caplog.text and "token id 300" in caplog.text
    session.release(7, 56)
    assert marks() == (56, 56) and session.ledger == Ledger.load(path)
    assert [event.at for event in Ledger.load(path).history.events] == [0, 32, None]


def test_a_new_run_does_not_overwrite_the_progress_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, first = tmp_path / "shared.json", tmp_path / "first"
    data = DataConfig(train=[write(tmp_path / "a", [[1] * 241])], ledger=str(path))

    def started(folder: Path, data: DataConfig, *position: int) -> History:
        run = make_run(data, folder, train_steps=8)
        run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save_interval=2))
        caplog.clear()
        session = LedgerSession(run, Alone())
        session.start(*position)
        if not position:
            session.sync(2, 16)
        assert session.ledger is not None
        return session.ledger.history

    assert started(first, data).last_synced_sample == 16 and not caplog.records
    before = path.read_bytes()
    second = tmp_path / "second"
    copy = f"cp {path} {second}/ledger.json"
    with pytest.raises(DataError, match=f"read to sample 16, but {second} has no checkpoint .*{copy}, .*data.ledger"):
        started(second, data)
    assert path.read_bytes() == before
    second.mkdir()
    (second / "ledger.json").write_bytes(before)  # as the message says
    assert started(second, dataclasses.replace(data, ledger=None)).last_synced_sample == 16
    assert f"{second} has no checkpoint to resume from: this run starts at sample 0" in caplog.text
    assert path.read_bytes() == before
    assert started(first, data, 2, 16).last_synced_sample == 16 and not caplog.records
    first.mkdir()
    (first / "run.yaml").touch()  # a run that was killed before its first checkpoint
    assert started(first, data).steps == (StepSize(0, 0, 8),)
    assert f"{first} has no checkpoint to resume from: this run starts at sample 0" in caplog.text


def test_another_past_is_refused(tmp_path: Path) -> None:
    path, saved = tmp_path / "ledger.json", tmp_path / "step_00000010"
    saved.mkdir()
    past = own().then(released)
    Ledger(past).save(saved / "ledger.json")
    fingerprint = past.fingerprint(50)

    def message(ledger: History | None) -> str:
        with pytest.raises(CheckpointError) as error:
            check_past(ledger, path, saved, 50, fingerprint)
        return str(error.value)

    check_past(past.then(remove, ["b"], at=50), path, saved, 50, fingerprint)
    copy = f"cp {saved}/ledger.json {path}"
    said = message(past.then(remove, ["b"], at=45))
    assert "for the first 50 samples: it has remove b at sample 45, where there was none" in said
    assert f"withdraw the change: steel-megatron data cancel {path} --at 45" in said
    Ledger(past).then(remove, ["b"], at=45).save(path)
    with edit(path) as file:
        file.ledger = file.ledger.then(released).then(cancel, 45)  # the fix that the message names
    check_past(Ledger.load(path).history, path, saved, 50, fingerprint)
    assert "it has no change, where there was read a 2 times at sample 30" in message(past.then(cancel, 30))
    assert copy in message(past.then(cancel, 30))
    assert "its seed is 7 in place of 1234" in message(dataclasses.replace(past, seed=7))
    assert f"the first 50 samples: the ledger is missing; go back to the checkpoint's ledger ({copy})" in message(None)
    (saved / "ledger.json").unlink()
    assert f"has for the first 50 samples; go back to the checkpoint's ledger ({copy})" in message(
        past.then(cancel, 30)
    )


def test_the_first_difference_is_found() -> None:
    assert first_difference(own(), own(), 100) is None
    assert first_difference(two(), own(), 30) is None
    assert first_difference(two(), own(), 31) == ("it has no change, where there was read a 2 times at sample 30", None)
    assert first_difference(own(), two(), 31) == ("it has read a 2 times at sample 30, where there was none", 30)
    other = two().then(reweight, {"a": 3}, at=30)
    assert first_difference(own(), other, 31) == (
        "it has read a 2 times at sample 30, where there was read a 3 times at sample 30",
        None,
    )
    assert first_difference(dataclasses.replace(two(), sequence_length=4), two(), 0) is not None


def test_caches_of_finished_epochs_are_removed(tmp_path: Path) -> None:
    ledger = start(two().then(reweight, {"a": 3, "b": None}, at=0), position(250, 260, 260))
    consumed = ledger.schedule.consumed(250).tolist()
    assert max(consumed) >= 100
    for number, entry in enumerate(ledger.corpora):
        for epoch in range(3):
            (tmp_path / f"{number}-{epoch}.json").write_text(
                f'{{"content": "{entry.content}", "key": [1, 2, {epoch}]}}'
            )
    prune_cache(ledger, tmp_path)
    left_over = {f"{number}-{epoch}" for number in range(2) for epoch in range(3) if epoch >= consumed[number] // 100}
    assert {path.stem for path in tmp_path.iterdir()} == left_over and len(left_over) < 6


def _sync(path: Path, moment: int, change: Callable[[History], History]) -> None:
    fsync, count = os.fsync, [0]

    def die(descriptor: int) -> None:
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = die
    with edit(path) as file:
        file.ledger = file.ledger.then(change)
    os._exit(0)


@pytest.mark.timeout(60)
def test_a_kill_while_a_change_is_applied_loses_nothing(tmp_path: Path) -> None:
    path, before = tmp_path / "ledger.json", own().then(add, [corpus("new", 10, "en")])
    after = resume(before, own(), position(40, 60))
    found = []
    for moment in (1, 2, 3):
        path.write_text(dumps(before))
        arguments = path, moment, lambda ledger: resume(ledger, own(), position(40, 60))
        process = multiprocessing.get_context("fork").Process(target=_sync, args=arguments)
        process.start()
        process.join(timeout=30)
        found.append(Ledger.load(path).history == after)
        assert Ledger.load(path).history in (before, after)
        # Killed before the checkpoint at 40: resumed at 20, the new corpus comes at 40 or now, and all of it.
        resumed = start(Ledger.load(path).history, position(20, 40))
        assert resumed.fingerprint(20) == own().fingerprint(20)
        assert resumed.schedule.consumed(int(resumed.schedule.capacity())).tolist() == [200, 100, 30, 10]
        if found[-1]:
            assert located(resumed, 0, 60) == located(after, 0, 60)
    assert found == [False, True, True]


def test_a_lock_that_stays_is_an_error_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.json"
    Ledger(own()).save(path)
    monkeypatch.setattr(ledger_module, "LOCK_SECONDS", 0.2)
    with edit(path), pytest.raises(DataError, match="another job is writing"), edit(path):
        pass
