"""The commands of a ledger: each option by what it makes of the file; locks, kills and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.cli import main
from steel_megatron.data.ledger import ledger as ledger_module
from steel_megatron.data.ledger.changes import apply_pending, at_step
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora, edit
from steel_megatron.data.ledger.records import Event, Unchanged
from steel_megatron.files import exclusive_lock
from tests.data.corpora import inputs, write

Folder = Path


def texts(*numbers: int) -> list[list[int]]:
    """Documents of 20 tokens, no two alike."""
    return [list(range(30 * number, 30 * number + 20)) for number in numbers]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Corpora a, b (10 documents of which are in a) and c, and a ledger of a; one is in the folder."""
    for name, numbers in (("a", range(50)), ("b", range(40, 90)), ("c", range(100, 130))):
        write(tmp_path / name, texts(*numbers), rows=list(range(1, len(numbers) + 1)), inputs=inputs(len(numbers)))
    monkeypatch.chdir(tmp_path)
    assert data("create", "l.json", "a", "--sequence_length", "10", "--domain", "zh", "--epochs", "2") == 0
    return tmp_path


def data(*words: str) -> int:
    return main(["data", *words])


def last(path: str = "l.json") -> Event:
    return Ledger.load(path).history.events[-1]


def running(reached: int, reserved: int) -> None:
    with edit("l.json") as file:
        file.ledger = file.ledger.then(apply_pending, reached, reserved)


def test_create(folder: Folder) -> None:
    ledger = Ledger.load("l.json")
    assert (
        ledger.history.sequence_length,
        ledger.history.seed,
        ledger.history.last_synced_sample,
        ledger.history.next_sync_sample,
    ) == (10, 1234, 0, 0)
    assert [(corpus.name, corpus.domain, corpus.prefix) for corpus in ledger.history.corpora] == [
        ("a", "zh", "a")  # given relative
    ]
    assert (
        ledger.history.events == (Event(0, ledger.history.events[0].add),)
        and ledger.history.events[0].add[0].epochs == 2.0
    )
    words = ["create", "m.json", "a", "b", "--sequence_length", "12", "--seed", "5", "--names", "x", "y"]
    assert data(*words) == 0
    ledger = Ledger.load("m.json")
    assert (ledger.history.sequence_length, ledger.history.seed, ledger.history.schedule.capacity()) == (
        12,
        5,
        float("inf"),
    )
    assert [(corpus.name, corpus.domain) for corpus in ledger.history.corpora] == [("x", "default"), ("y", "default")]


def test_append(folder: Folder) -> None:
    assert data("append", "l.json", "b", "c") == 0
    ledger = Ledger.load("l.json")
    assert [(corpus.name, corpus.domain) for corpus in ledger.history.corpora[1:]] == [
        ("b", "default"),
        ("c", "default"),
    ]
    assert (
        last().at is None
        and [added.epochs for added in last().add] == [1.0, 1.0]
        and last().mixture is Unchanged.MIXTURE
    )
    assert ledger.history.corpora[1].dropped is None
    assert data("cancel", "l.json") == 0
    words = ["--names", "x", "--domain", "en", "--epochs", "2.5", "--at", "30", "--mixture", "zh=3", "en=1"]
    assert data("append", "l.json", "b", *words, "--drop_duplicates", "true") == 0
    dropped = (corpus := Ledger.load("l.json").history.known()[1]).dropped
    assert (corpus.name, corpus.domain, dropped and dropped.documents) == ("x", "en", 10)
    assert last().at == 30 and last().add[0].epochs == 2.5 and last().mixture == {"zh": 3, "en": 1}
    assert data("append", "l.json", "a", "c", "--on_duplicate", "skip", "--domain", "en", "--epochs", "null") == 0
    assert [corpus.name for corpus in Ledger.load("l.json").history.known()] == ["a", "x", "c"]
    assert last().at is None and [added.epochs for added in last().add] == [None]
    before = Path("l.json").read_bytes()
    assert data("append", "l.json", "c", "--on_duplicate", "stop") == 2 == data("append", "l.json", "c")
    assert Path("l.json").read_bytes() == before


def test_the_others(folder: Folder) -> None:
    assert data("append", "l.json", "b", "c", "--at", "0") == 0
    assert data("remove", "l.json", "b", "c") == 0 and last() == Event(None, remove=("b", "c"))
    assert data("cancel", "l.json") == 0 and last().add
    assert data("remove", "l.json", "b", "--at", "40") == 0 and last() == Event(40, remove=("b",))
    assert data("reweight", "l.json", "a", "c", "--epochs", "1.5") == 0
    assert last() == Event(None, epochs={"a": 1.5, "c": 1.5})
    assert data("reweight", "l.json", "a", "--epochs", "null", "--at", "50") == 0
    assert last() == Event(50, epochs={"a": None})
    assert data("mixture", "l.json", "zh=2", "default=1") == 0
    assert last() == Event(None, mixture={"zh": 2, "default": 1})
    assert data("mixture", "l.json", "none", "--at", "60") == 0 and last() == Event(60, mixture=None)
    assert data("cancel", "l.json", "--at", "50") == 0
    assert [event.at for event in Ledger.load("l.json").history.events] == [0, 0, 40, None, None, 60]
    assert data("cancel", "l.json") == 0
    assert [event.at for event in Ledger.load("l.json").history.events] == [0, 0, 40, 60]


CHANGES = [
    ["append", "l.json", "c", "--at", "25"],
    ["remove", "l.json", "b", "--at", "25"],
    ["reweight", "l.json", "a", "--epochs", "3", "--at", "25"],
    ["mixture", "l.json", "none", "--at", "25"],
    ["cancel", "l.json", "--at", "28"],
]


@pytest.mark.parametrize("words", CHANGES, ids=[words[0] for words in CHANGES])
def test_what_a_run_reads_before_its_next_sync_stays(
    folder: Folder, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = "l.json.run" if words[0] == "append" else "run"
    assert data("append", "l.json", "b") == 0
    assert data("mixture", "l.json", "none", "--at", "28") == 0
    running(20, 30)
    before = Path("l.json").read_bytes()
    with exclusive_lock(lock, ledger_module.DataError):
        assert data(*words) == 2 == data(*words, "--stopped", "true")
        said = capsys.readouterr().err
        assert "a live run reads to sample 30 before its next sync" in said and "stop the run" in said
        assert Path("l.json").read_bytes() == before
        assert data("show", "l.json") == 0 and "run at 20, next sync at 30" in capsys.readouterr().out
    Path(f"{lock}.lock").touch()  # left by a kill
    assert data("show", "l.json") == 0 and "next sync" not in capsys.readouterr().out
    assert data(*words, "--stopped", "true") == 0 and "--stopped is no longer needed" in capsys.readouterr().err
    ledger = Ledger.load("l.json")
    assert (ledger.history.last_synced_sample, ledger.history.next_sync_sample) == (20, 20) and len(
        ledger.history.events
    ) == (2 if words[0] == "cancel" else 4)


def test_show(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert data("show", "l.json", *words, "--json_output", "true") == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def samples(*words: str) -> set[int]:
        return {part["sample"] for part in shown(*words)}

    assert data("show", "l.json", "--step", "1") == 2
    assert "no run.yaml next to l.json" in capsys.readouterr().err
    assert samples("--step", "2", "--global_batch_size", "4") == {4, 5, 6, 7}
    Path("run.yaml").write_text("training: {global_batch_size: 2}\n")
    assert samples("--step", "2") == {2, 3} and samples("--sample", "9") == {9}
    with edit("l.json") as file:
        file.ledger = file.ledger.then(at_step, 0, 0, 3).then(at_step, 2, 6, 5)
    assert [samples("--step", str(step)) for step in (2, 3)] == [{3, 4, 5}, {6, 7, 8, 9, 10}]
    assert samples("--step", "3", "--global_batch_size", "4") == {8, 9, 10, 11}
    part = shown("--sample", "0")[0]
    document = np.array(part["ids"]) // 30
    assert (part["corpus"], part["origin"]["row"]) == ("a", document[0] + 1) and part["document"] == document[0]
    assert part["text"] == " ".join(map(str, part["ids"]))
    assert data("show", "l.json") == 0
    assert "a (zh): 99 samples, 50 documents, read 0.00 times" in capsys.readouterr().out
    running(9, 30)
    for epochs, at in (("3", ["--at", "50"]), ("4", []), ("5", ["--at", "20"])):
        capsys.readouterr()
        assert data("reweight", "l.json", "a", "--epochs", epochs, *at) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  from ")]
    assert [line.rpartition(": ")[2] for line in lines] == [
        *("add a (2 times)", "read a 4 times", "read a 5 times", "read a 3 times"),
    ]
    for words in (["--sample", "9" * 20], ["--step", "0"], ["--step", "1", "--sample", "1"], ["--sample", "-1"]):
        assert data("show", "l.json", *words) == 2
        assert "error: " in capsys.readouterr().err


def test_of_many_corpora_the_first_ones_are_named(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"many{number}" for number in range(30)]
    for number, name in enumerate(names):
        write(folder / name, texts(1000 + number))
    assert data("create", "many.json", *names, "--sequence_length", "10") == 0
    (added,) = [line for line in capsys.readouterr().out.splitlines() if "add many0" in line]
    assert added.endswith("add many7 (without limit); and so for 22 more")


def test_texts_are_decoded(folder: Folder, sp_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from steel_megatron.data.tokenizing.tokenizer import load_tokenizer

    words = ["--tokenizer_path", str(sp_model), "--tokenizer_kind", "sentencepiece", "--json_output", "true"]
    write(folder / "small", [[300 + number] * 20 for number in range(5)])
    assert data("create", "s.json", "small", "--sequence_length", "10") == 0
    capsys.readouterr()
    assert data("show", "s.json", "--sample", "0", *words) == 0
    part = json.loads(capsys.readouterr().out.splitlines()[0])
    assert part["text"] == load_tokenizer("sentencepiece", str(sp_model)).decode(part["ids"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "l.json", "b", "--sequence_length", "8"], "l.json exists already"),
        (["create", "n.json", "b", "--sequence_length", "0"], "sequence_length is 0 and seed 1234"),
        (["create", "n.json", "b", "--sequence_length", "8", "--seed", "-1"], "seed -1"),
        (["append", "l.json", "b", "--epochs", "1" + "0" * 400], "--epochs is 1000"),
        (["append", "l.json", "b", "--at", "9" * 30], "is too late for a change: the latest is"),
        (["mixture", "l.json", "zh=1" + "0" * 300], "at most 5e+18"),
        (["cancel", "l.json", "--at", "0"], "nothing would be left"),
        *(
            (["skip", "l.json", "--samples", samples], f"samples is '{samples}'; it must be FIRST:END, such as 512:520")
            for samples in ("5", "a:b", "5:", ":5", "-1:5", "1.5:2", "1:2:3", "\u00bd:2")
        ),
        (["skip", "l.json", "--samples", "5:5"], "5"),
        (["skip", "l.json", "--samples", "8:5"], "8"),
    ],
)
def test_what_is_refused(folder: Folder, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    assert data(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


# ---- at the same time ----


def _slow_append(begun: Any, go_on: Any, *words: str) -> None:
    plain = ledger_module.describe

    def describe(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return plain(*arguments)

    ledger_module.describe = describe
    os._exit(data(*words))


def meanwhile(work: Callable[[], None], *words: str) -> int | None:
    """The exit code of an append during whose reading something else is done."""
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    process = context.Process(target=_slow_append, args=(begun, go_on, *words))
    process.start()
    assert begun.wait(30)
    work()
    go_on.set()
    process.join(timeout=30)
    return process.exitcode


@pytest.mark.timeout(90)
def test_others_may_change_the_ledger_while_corpora_are_read(folder: Folder) -> None:
    def work() -> None:
        running(0, 30)
        assert data("append", "l.json", "a" if drop else "c", "--on_duplicate", "skip") == 0

    drop = False
    with exclusive_lock("run", ledger_module.DataError):
        assert meanwhile(work, "append", "l.json", "b") == 0
    assert [corpus.name for corpus in Ledger.load("l.json").history.corpora] == ["a", "c", "b"]
    assert Ledger.load("l.json").history.next_sync_sample == 30


@pytest.mark.timeout(90)
def test_what_came_meanwhile_is_compared_too(folder: Folder) -> None:
    write(folder / "d", texts(*range(60, 130)))

    def work() -> None:
        assert data("append", "l.json", "b") == 0

    assert meanwhile(work, "append", "l.json", "d", "--drop_duplicates", "true") == 0
    dropped = Ledger.load("l.json").history.corpora[2].dropped
    assert dropped is not None and dropped.documents == 30  # 60 to 89 are in b, which was not there at first


@pytest.mark.timeout(60)
def test_a_ledger_that_is_being_changed_is_waited_for(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    waits = context.Event()

    def remove() -> None:
        from steel_megatron import files

        files.logger.info = lambda message: waits.set() if "waiting for another job" in message else None  # type: ignore[method-assign]
        os._exit(data("remove", "l.json", "a"))

    with exclusive_lock("l.json", ledger_module.DataError):
        process = context.Process(target=remove)
        process.start()
        assert waits.wait(30) and process.is_alive()
    process.join(timeout=30)
    assert process.exitcode == 0 and last() == Event(None, remove=("a",))


def _killed_at(write_number: int, path: str, *words: str) -> None:
    """Give a command and die within one of its atomic writes: before the file has its name, or just after."""
    from steel_megatron import files

    plain, count = files.sync_folder, [0]
    fsync = os.fsync

    def die(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == write_number:
            os.kill(os.getpid(), signal.SIGKILL)
        (fsync if isinstance(arguments[0], int) else plain)(*arguments)

    os.fsync, files.sync_folder = die, die  # type: ignore[assignment]
    os._exit(main(["data", *words]))


@pytest.mark.timeout(120)
def test_a_kill_during_append_loses_nothing(folder: Folder) -> None:
    context, words = multiprocessing.get_context("fork"), ["append", "l.json", "b", "--drop_duplicates", "true"]
    outcomes = []
    for moment in range(1, 20):
        before = Ledger.load("l.json").history
        process = context.Process(target=_killed_at, args=(moment, "l.json", *words))
        process.start()
        process.join(timeout=60)
        OpenCorpora(loaded := Ledger.load("l.json"))
        after = loaded.history
        outcomes.append(after != before)
        assert after.corpora[0] == before.corpora[0] and after.events[0] == before.events[0]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if after != before:
            assert data("cancel", "l.json") == 0
    assert process.exitcode == 0 and outcomes[0] is False and outcomes[-2] is True and len(outcomes) >= 5
    assert not list(folder.glob("l.json.lock"))
