"""A run and its ledger: the same samples under any layout, data appended between stops, a past that stays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.cli import main
from steel_megatron.config import DataConfig, RunConfig
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.ledger.loader import LedgerSamples
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import losses, make_run, one

pytestmark = pytest.mark.slow

LENGTH = 24
SAMPLES = 20
"""Of each corpus; a step takes 8."""


def write(prefix: Path, first: int) -> str:
    """Tokens of ``first`` to ``first + 29`` only, so that a sample tells which corpus it is from."""
    random = np.random.default_rng(first)
    with IndexedWriter(prefix, np.uint16) as writer:
        for size in [48] * (SAMPLES // 2) + [1]:
            writer.add_document(first + random.integers(0, 30, size))
        writer.finalize({})
    return str(prefix)


def read(run: RunConfig, first_step: int, last_step: int) -> list[list[list[list[int]]]]:
    """The micro batches of this process in some steps, as tokens with the last label."""
    from steel_megatron.data.ledger.session import LedgerSession
    from steel_megatron.parallel import agreement
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.batches import Batches

    session, size = LedgerSession(run, agreement), run.training.global_batch_size
    batches = Batches(run, topology, session)
    session.start(first_step - 1, (first_step - 1) * size)
    found = []
    for step in range(first_step, last_step + 1):
        micro = batches.training((step - 1) * size)
        found.append([np.concatenate([one.tokens, one.labels[:, -1:]], axis=1).tolist() for one in micro])
    return found


def live(run: RunConfig, commands: dict[int, list[list[str]]], kill_at: int = -1) -> Any:
    """A run in which somebody gives commands before the step that begins at a sample; what it read is written down.

    Returns:
        its outcome, the exit code of each command, and what was said.
    """
    from steel_megatron.log import setup_logging
    from steel_megatron.train.batches import Batches
    from steel_megatron.train.loop import pretrain

    plain, rank, codes = Batches.training, int(os.environ["RANK"]), []

    def training(self: Batches, consumed: int) -> list[Any]:
        if rank == 0:
            codes.extend(main(["data", *words]) for words in commands.get(consumed, []))
        if consumed == kill_at:
            saved = Path(run.checkpoint.directory) / "checkpoints" / f"step_{kill_at // 8 - 1:08d}"
            while not saved.exists():  # it is written while training continues
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        found = plain(self, consumed)
        micro = [np.concatenate([one.tokens, one.labels[:, -1:]], axis=1).tolist() for one in found]
        with (Path(run.checkpoint.directory) / f"read-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([consumed, micro]) + "\n")
        return found

    Batches.training = training  # type: ignore[method-assign]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        setup_logging()
        return pretrain(run), codes, said.getvalue()


def was_read(folder: Path, processes: int = 1) -> dict[int, list[list[int]]]:
    """By position, what runs in a folder read there, each time; and the files are gone."""
    ranks = []
    for rank in range(processes):
        path = folder / f"read-{rank}.jsonl"
        ranks.append([json.loads(line) for line in path.read_text().splitlines()])
        path.unlink()
    found: dict[int, list[list[int]]] = {}
    for steps in zip(*ranks, strict=True):
        samples = global_batches([[micro] for _, micro in steps])[0]
        for place, sample in enumerate(samples):
            found.setdefault(steps[0][0] + place, []).append(sample)
    return found


def says(ledger: Path, begin: int, end: int) -> dict[int, list[list[int]]]:
    """What a ledger says of some positions."""
    samples = LedgerSamples(Ledger.load(ledger))
    return {number: [samples.sample(number).tolist()] for number in range(begin, end)}


def changed(run: RunConfig, save_interval: int = 1000, **training: Any) -> RunConfig:
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, **training),
        checkpoint=dataclasses.replace(run.checkpoint, save_interval=save_interval),
    )


def global_batches(by_rank: list[Any]) -> list[list[list[int]]]:
    """The samples of each step in their order, from what data-parallel processes read."""
    steps = []
    for of_ranks in zip(*by_rank, strict=True):
        steps.append([sample for micro in zip(*of_ranks, strict=True) for share in micro for sample in share])
    return steps


def test_the_same_samples_for_any_number_of_processes_and_workers(tmp_path: Path) -> None:
    data = DataConfig(train=[write(tmp_path / "a", 0), write(tmp_path / "b", 30)])
    alone = global_batches(run_distributed(read, 1, make_run(data, tmp_path / "1"), 1, 6))
    for name, processes, workers in (("dp2", 2, 0), ("dp4", 4, 0), ("workers", 1, 2)):
        run = make_run(dataclasses.replace(data, num_workers=workers), tmp_path / name)
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, micro_batch_size=2))
        assert global_batches(run_distributed(read, processes, run, 1, 6)) == alone, name
    for name in ("tp2", "pp2", "ep2"):
        run = make_run(data, tmp_path / name, LAYOUTS[name])
        by_rank = run_distributed(read, 2, run, 1, 6)
        for own in [by_rank] if name == "ep2" else [[rank] for rank in by_rank]:  # experts are shared by data ranks
            assert global_batches(own) == alone, name
    later = make_run(data, tmp_path / "1")
    assert global_batches(run_distributed(read, 1, later, 4, 6)) == alone[3:]
    seen = Counter(tuple(sample) for step in alone[:5] for sample in step)  # 40 samples are one epoch of both
    assert set(seen.values()) == {1} and len(seen) == 2 * SAMPLES


def test_data_is_appended_between_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    first, second = write(tmp_path / "a", 0), write(tmp_path / "b", 30)
    run = make_run(DataConfig(train=[first]), folder, train_steps=5, stop_after_step=1)
    assert one(run).step == 1
    ledger = folder / "ledger.json"
    assert main(["data", "reweight", str(ledger), "a", "--epochs", "1"]) == 0
    assert main(["data", "append", str(ledger), second]) == 0
    assert "from the next checkpoint, or from where the run resumes: add b (1 times)" in capsys.readouterr().out
    assert main(["data", "append", str(ledger), second]) == 2
    assert "is in the ledger already, as b" in capsys.readouterr().err
    rest = dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))
    summary = one(rest)
    assert summary.finished and [step for step, _ in losses(rest)] == [1, 2, 3, 4, 5]
    applied = Ledger.load(ledger)
    assert [event.at for event in applied.history.events] == [
        0,
        8,
        8,
    ] and applied.history.schedule.capacity() == 2 * SAMPLES
    assert json.loads((summary.checkpoint / "ledger.json").read_text()) == json.loads(ledger.read_text())
    assert main(["data", "show", str(ledger), "--step", "1", "--json_output", "true"]) == 0
    before = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    after = []
    for step in range(2, 6):
        assert main(["data", "show", str(ledger), "--step", str(step), "--json_output", "true"]) == 0
        after += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {part["corpus"] for part in before} == {"a"}
    count = Counter(part["corpus"] for part in {part["sample"]: part for part in after}.values())
    assert count == {"a": SAMPLES - 8, "b": SAMPLES}  # everything unseen of both, once
    assert main(["data", "show", str(ledger)]) == 0
    assert "samples in all: 40" in capsys.readouterr().out


def test_appended_data_is_applied_at_a_checkpoint(tmp_path: Path) -> None:
    """No restart is needed; after a kill and under two processes, every sample is the one that the ledger says."""
    folder, ledger = tmp_path / "run", tmp_path / "run" / "ledger.json"
    first, second, third = (write(tmp_path / name, 30 * number) for number, name in enumerate("abc"))
    run = changed(make_run(DataConfig(train=[first]), folder, train_steps=8), save_interval=2)
    commands = {
        8: [["append", str(ledger), second, "--at", "12"], ["append", str(ledger), second]],
        24: [["append", str(ledger), third, "--at", "40"], ["cancel", str(ledger), "--at", "16"]],
    }
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_distributed(live, 1, run, commands, 40)
    loaded = Ledger.load(ledger)
    assert [(event.at, [added.corpus for added in event.add]) for event in loaded.history.events] == [
        *((0, [0]), (16, [1]), (40, [2])),
    ]
    assert (loaded.history.last_synced_sample, loaded.history.next_sync_sample) == (
        32,
        48,
    )  # the kill left the next sync in the file
    before = was_read(folder)
    assert before == says(ledger, 0, 40)
    assert {sample[0] >= 30 for number in range(16) for sample in before[number]} == {False}
    assert {sample[0] >= 30 for number in range(16, 40) for sample in before[number]} == {False, True}
    for words in (["cancel", str(ledger), "--at", "40"], ["append", str(ledger), third, "--at", "40"]):
        assert main(["data", *words]) == 0  # the kill released what the run had not saved
    again = Ledger.load(ledger).history
    assert [event.at for event in again.events] == [0, 16, 40] and again.corpora[
        again.events[2].add[0].corpus
    ].name == "c"
    with_worker = dataclasses.replace(run, data=dataclasses.replace(run.data, num_workers=1))
    fourth = ["append", str(ledger), write(tmp_path / "d", 65)]
    summary, codes, _ = run_distributed(live, 2, with_worker, {40: [fourth]})[0]
    assert summary.finished and codes == [0] and Ledger.load(ledger).history.events[-1].at == 48
    assert was_read(folder, 2) == says(ledger, 32, 64)
    loaded = Ledger.load(ledger)
    assert (loaded.history.last_synced_sample, loaded.history.next_sync_sample) == (
        64,
        64,
    ) and loaded.history.schedule.consumed(64)[1] == 20
    assert (summary.checkpoint / "ledger.json").read_bytes() == ledger.read_bytes()


def _prepared(run: RunConfig) -> list[str]:
    """What is in the caches when a run has begun and read nothing yet."""
    from steel_megatron.data.ledger.session import LedgerSession
    from steel_megatron.data.sampling import packing
    from steel_megatron.parallel import agreement
    from steel_megatron.parallel.topology import initialize

    packing._SAMPLES_OF_FILE = 0
    initialize(run.parallel)
    session = LedgerSession(run, agreement)
    cache = run.ledger_path.with_suffix(".cache")
    cache.mkdir(parents=True)
    (cache / "left.123.partial").touch()
    os.utime(cache / "left.123.partial", (0, 0))
    session.start(0, 0)
    return sorted(path.suffix for path in cache.iterdir())


def test_the_first_indices_are_made_by_one_process(tmp_path: Path) -> None:
    run = make_run(DataConfig(train=[write(tmp_path / "a", 0), write(tmp_path / "b", 30)]), tmp_path / "run")
    assert run_distributed(_prepared, 1, run) == [[".json", ".json", ".npy", ".npy"]]


def test_a_live_run_refuses_positions_that_it_has_read(tmp_path: Path) -> None:
    ledger = tmp_path / "elsewhere" / "ledger.json"  # not in the run's folder, which has a lock of its own
    first, second = write(tmp_path / "a", 0), write(tmp_path / "b", 30)
    data = DataConfig(train=[first], ledger=str(ledger))
    run = changed(make_run(data, tmp_path / "run", train_steps=4), save_interval=2)
    words = ["append", str(ledger), second, "--at", "12"]
    summary, codes, said = run_distributed(live, 1, run, {8: [words, ["cancel", str(ledger), "--at", "12"]]})[0]
    assert summary.finished and codes == [2, 2]
    assert "a live run reads to sample 16 before its next sync" in said and "stop the run" in said
    assert len(Ledger.load(ledger).history.corpora) == 1
    assert not list(ledger.parent.glob("*.lock"))
    other = make_run(data, tmp_path / "other", train_steps=4)
    assert "was read to sample 32" in one(other) and not (tmp_path / "other" / "run.yaml").exists()


def test_changes_that_cannot_be_applied_do_not_end_a_run(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "run", tmp_path / "run" / "ledger.json"
    first, second = write(tmp_path / "a", 0), write(tmp_path / "wrong", 90)
    run = changed(make_run(DataConfig(train=[first]), folder, train_steps=6), save_interval=2)
    third = write(tmp_path / "b", 30)
    commands = {8: [["append", str(ledger), second]], 24: [["append", str(ledger), third, "--at", "40"]]}
    summary, codes, said = run_distributed(live, 2, run, commands)[0]
    assert summary.finished and codes == [0, 0]
    assert "cannot be applied at sample 16; they are deferred to the next checkpoint" in said
    assert "holds token id 1" in said and "withdraw the changes (steel-megatron data cancel)" in said
    events = [(event.at, [added.corpus for added in event.add]) for event in Ledger.load(ledger).history.events]
    assert events == [(0, [0]), (None, [1]), (None, [2])]  # nothing is lost, and the file says what was read
    assert was_read(folder, 2) == says(ledger, 0, 48)


def _without_room_at_16(run: RunConfig, commands: dict[int, list[list[str]]]) -> Any:
    """:func:`live`, where the index cannot be written at sample 16."""
    from steel_megatron.data.ledger.loader import LedgerSamples
    from steel_megatron.errors import DataError

    prepare = LedgerSamples.prepare

    def refused(samples: LedgerSamples, begin: int, end: int) -> None:
        if begin == 16:
            raise DataError("cannot write an index: No space left on device")
        prepare(samples, begin, end)

    LedgerSamples.prepare = refused  # type: ignore[method-assign]
    return live(run, commands)


def test_a_full_disk_for_a_moment_delays_a_change(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / "ledger.json"
    first, second, third = (write(tmp_path / name, number) for name, number in (("a", 0), ("b", 30), ("c", 60)))
    run = changed(make_run(DataConfig(train=[first]), tmp_path / "run", train_steps=6), save_interval=2)
    commands = {8: [["append", str(ledger), second]], 24: [["append", str(ledger), third]]}
    summary, codes, said = run_distributed(_without_room_at_16, 2, run, commands)[0]
    assert summary.finished and codes == [0, 0] and "cannot be applied at sample 16" in said
    applied = Ledger.load(ledger).history
    assert [(event.at, [applied.corpora[added.corpus].name for added in event.add]) for event in applied.events] == [
        (0, ["a"]), (32, ["b"]), (32, ["c"]),
    ]  # fmt: skip
    saved = Ledger.load(tmp_path / "run/checkpoints/step_00000002/ledger.json")
    assert [event.at for event in saved.history.events] == [0]


def test_other_sizes_of_batches_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run = make_run(DataConfig(train=[write(tmp_path / "a", 0)]), folder, train_steps=6, stop_after_step=2)
    assert one(run).step == 2
    assert one(changed(run, global_batch_size=4, stop_after_step=5)).step == 5
    summary = one(changed(run, global_batch_size=16, train_steps=7, stop_after_step=None))
    assert summary.finished and summary.step == 7
    assert json.loads((summary.checkpoint / "steel.json").read_text())["consumed_samples"] == 16 + 3 * 4 + 2 * 16
    for step, samples in ((2, range(8, 16)), (3, range(16, 20)), (5, range(24, 28)), (7, range(44, 60))):
        capsys.readouterr()
        assert main(["data", "show", str(folder / "ledger.json"), "--step", str(step), "--json_output", "true"]) == 0
        assert {json.loads(line)["sample"] for line in capsys.readouterr().out.splitlines()} == set(samples)
    message = one(changed(run, train_steps=3, stop_after_step=None))
    assert "training.train_steps is 3, but the run has done 7 steps already" in message
    shutil.rmtree(summary.checkpoint)
    again = one(changed(run, global_batch_size=8, train_steps=6, stop_after_step=None))
    assert again.finished
    assert [dataclasses.astuple(size) for size in Ledger.load(folder / "ledger.json").history.steps] == [
        *((0, 0, 8), (2, 16, 4), (5, 28, 8)),
    ]


def test_a_refused_start_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / "ledger.json"
    prefixes = [write(tmp_path / "a", 0), write(tmp_path / "b", 30)]
    assert main(["data", "create", str(ledger), *prefixes, "--sequence_length", str(LENGTH), "--epochs", "1"]) == 0
    run = make_run(DataConfig(), tmp_path / "run", train_steps=5, stop_after_step=1)
    assert one(run).step == 1
    rest, before = changed(run, stop_after_step=None), Ledger.load(ledger).history.events
    for words, message in (
        (["remove", str(ledger), "b"], "40 are needed"),
        (["append", str(ledger), write(tmp_path / "wrong", 90)], "holds token id 1"),
    ):
        assert main(["data", *words]) == 0
        changed_bytes = ledger.read_bytes()
        assert message in one(rest) and ledger.read_bytes() == changed_bytes
        assert main(["data", "cancel", str(ledger)]) == 0 and Ledger.load(ledger).history.events == before
    assert one(rest).finished


def _read_with_another_ledger(run: RunConfig, first_step: int, last_step: int, prefix: str) -> Any:
    """The second process would find a ledger that was changed a moment later."""
    from steel_megatron.data.ledger import ledger

    plain = ledger.Ledger.load.__func__  # type: ignore[attr-defined]
    if os.environ["RANK"] == "1":
        ledger.Ledger.load = classmethod(lambda cls, path: plain(cls, path).append([prefix], at=16))  # type: ignore
    return read(run, first_step, last_step)


def test_all_processes_read_by_the_very_same_ledger(tmp_path: Path) -> None:
    run = make_run(DataConfig(train=[write(tmp_path / "a", 0)]), tmp_path / "run", train_steps=6)
    steps = global_batches(run_distributed(_read_with_another_ledger, 2, run, 1, 5, write(tmp_path / "b", 30)))
    expected = says(tmp_path / "run" / "ledger.json", 0, 40)
    assert [[sample] for step in steps for sample in step] == list(expected.values())


def test_too_little_data_is_refused_before_the_first_step(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / "ledger.json"
    words = ["data", "create", str(ledger), write(tmp_path / "a", 0), "--sequence_length", str(LENGTH), "--epochs", "2"]
    assert main(words) == 0
    message = one(make_run(DataConfig(), tmp_path / "run", train_steps=6))
    assert "training.train_steps x training.global_batch_size" in message and "48" in message and "40" in message
    assert one(make_run(DataConfig(), tmp_path / "run", train_steps=5)).finished


def test_a_past_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = make_run(DataConfig(train=[write(tmp_path / "a", 0)]), tmp_path / "run", train_steps=4, stop_after_step=2)
    assert one(run).step == 2
    ledger = tmp_path / "run" / "ledger.json"
    content = json.loads(ledger.read_text())
    ledger.write_text(json.dumps({**content, "seed": content["seed"] + 1}))
    message = one(run)
    assert "trained on other data than" in message and "step_00000002/ledger.json" in message
    ledger.unlink()
    assert "trained on other data than" in one(run)
    ledger.write_bytes((tmp_path / "run/checkpoints/step_00000002/ledger.json").read_bytes())
    assert one(dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))).finished


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["append", "nowhere.json", "x"], "nowhere.json"),
        (["mixture", "nowhere.json", "zh"], "weight 'zh' is not DOMAIN=WEIGHT"),
        (["mixture", "nowhere.json", "zh=-1"], "weight 'zh=-1' is not DOMAIN=WEIGHT"),
        (["show", "nowhere.json", "--step", "1"], "nowhere.json"),
        (["create", "l.json", "x", "--sequence_length", "8"], "x.idx"),
        (["remove", "nowhere.json"], "names"),
    ],
)
def test_bad_commands(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
