"""The ledger's files: strict JSON, atomic changes that are not lost, corpora that have not changed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steel_megatron.data.indexed.dataset import IndexedCorpus, open_indexed
from steel_megatron.data.ledger import corpora as ledger_corpora
from steel_megatron.data.ledger.changes import add, apply_pending, at_step, remove
from steel_megatron.data.ledger.ledger import Ledger, OpenCorpora, dumps, edit
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock
from tests.data.corpora import write, write_megatron
from tests.data.ledgers import corpus, full, two

# ---- JSON ----


def test_a_ledger_is_the_same_after_a_file(tmp_path: Path) -> None:
    Ledger(full()).save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json").history == full()
    assert Ledger.load(tmp_path / "ledger.json").folder == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_ledgers_of_earlier_versions_can_be_read(tmp_path: Path) -> None:
    run = full().then(apply_pending, 40, 50).then(at_step, 5, 40, 8)
    content = json.loads(dumps(run))
    for added in ("reserved", "steps"):
        del content[added]
    for entry in content["corpora"]:
        entry.get("dropped", {}).pop("like", None)
        for spelled_out in ("tokenizer", "dropped"):
            entry.setdefault(spelled_out, None)
    (tmp_path / "ledger.json").write_text(json.dumps(content))
    loaded = Ledger.load(tmp_path / "ledger.json").history
    assert loaded == dataclasses.replace(run, next_sync_sample=40, steps=())
    assert loaded.fingerprint(90) == run.fingerprint(90)


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    Ledger(two()).save(path)
    for mode in (0o664, 0o600):
        path.chmod(mode)
        with edit(path) as opened:
            opened.ledger = opened.ledger.then(add, [corpus(f"mode{mode}", 9)])
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_lock_file_of_another_user_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(two()).save(tmp_path / "ledger.json")
    (tmp_path / "ledger.json.lock").touch()  # left by a kill
    plain = os.open

    def refused(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    prefix, refusal = tmp_path / "ledger.json", pytest.raises(DataError, match="another job is writing")
    with exclusive_lock(prefix, DataError), refusal, exclusive_lock(prefix, DataError):
        pass


def damaged(place: tuple[object, ...], value: object) -> str:
    whole = json.loads(dumps(full()))
    target = whole
    for step in place[:-1]:
        target = target[step]
    if value is KeyError:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "steel-megatron-ledger-9", "is no ledger of format 'steel-megatron-ledger-1'"),
        (("sequence_length",), 0, "sequence_length is 0; it must be a whole number from 1 to"),
        (("sequence_length",), True, "sequence_length is True"),
        (("seed",), -1, "seed is -1"),
        (("seed",), 1.0, "seed is 1.0"),
        (("seed",), KeyError, "has no field 'seed'"),
        (("surprise",), 1, "has an unknown field 'surprise'"),
        (("corpora",), {}, "corpora is {}; it must be a list"),
        (("corpora", 0), 5, r"corpora\[0\] is 5; it must be an object"),
        (("corpora", 0, "name"), "", r"corpora\[0\]: name is ''; it must be a text"),
        (("corpora", 1, "content"), "xyz", r"corpora\[1\]: content is 'xyz'; it must be 64 hex digits"),
        (("corpora", 1, "content"), corpus("a", 1).content, "has the content .* of a "),
        (("corpora", 1, "tokens"), 5, r"/data/b: 5 tokens make no sample"),
        (("reached",), KeyError, "has no field 'reached'; it must be a whole number from 0"),
        (("corpora", 1, "documents"), -3, r"corpora\[1\]: documents is -3"),
        (("corpora", 1, "tokenizer"), 3, "tokenizer is 3; it must be a text that is not empty, in UTF-8, or null"),
        (("corpora", 1, "colour"), 3, "unknown field 'colour'"),
        (("corpora", 2, "dropped", "sha256"), "f", r"corpora\[2\], dropped: sha256 is 'f'"),
        (
            ("corpora", 2, "dropped", "documents"),
            99,
            r"corpora\[2\]: 99 documents .* only 3",
        ),
        (("events",), None, "events is None; it must be a list"),
        (("events", 0, "at"), -1, r"events\[0\]: at is -1; it must be a sample's number, or null"),
        (("events", 0, "add", 0, "epochs"), KeyError, r"events\[0\], add\[0\] has no field 'epochs'"),
        (("events", 0, "add"), {}, r"events\[0\]: add is {}; it must be a list"),
        (("corpora", 2, "dropped"), 5, r"corpora\[2\]: dropped is 5; it must be an object, or null"),
        (("events", 0, "at"), KeyError, r"events\[0\] has no field 'at'"),
        (("events", 0, "when"), 3, r"events\[0\] has an unknown field 'when'"),
        (("events", 0, "add", 0, "corpus"), 9, r"events\[0\], add\[0\]: corpus is 9; it must be a whole number from 0"),
        (("events", 0, "add", 0, "epochs"), "two", r"add\[0\]: epochs is 'two'; it must be a number above 0"),
        (("events", 0, "add", 1, "corpus"), 0, "a is added at sample 0, but is active already"),
        (("events", 2, "epochs", "a"), 0, "epochs is .*; it must be by name"),
        (("events", 2, "epochs", "z"), 1, "has no corpus 'z'"),
        (("events", 3, "mixture", "zh"), "much", "mixture is .*; it must be weights by domain"),
        (("events", 4, "remove"), ["c", 3], "remove is .*; it must be a list of names"),
        (("reached",), "far", "reached is 'far'"),
        (("reserved",), -1, "reserved is -1; it must be a whole number from 0 to"),
        (("reached",), 5, "reserved is 0; it must be a whole number from 5 to"),
        (("steps",), 5, "steps is 5; it must be a list"),
        (("steps",), [{"step": 0, "consumed": 0, "global_batch_size": 0}], r"steps\[0\]: global_batch_size is 0"),
        (("steps",), 2 * [{"step": 3, "consumed": 9, "global_batch_size": 3}], r"steps\[1\]: step is 3; .* from 4"),
        (("corpora", 0, "max_id"), -1, "max_id is -1; it must be a token id, or null"),
        (("corpora", 2, "dropped", "like"), "a", r"corpora\[2\], dropped: like is 'a'"),
        (("events", 0, "add", 0, "epochs"), 10**400, r"add\[0\]: epochs is 1000.*at most 5e\+18"),
        (("events", 3, "mixture", "zh"), 10**400, r"mixture is .*at most 5e\+18"),
    ],
)
def test_a_damaged_file_is_refused(place: tuple[object, ...], value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(damaged(place, value))
    with pytest.raises(DataError, match=message) as error:
        Ledger.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, dumps(two()).encode()[:-20]])
def test_a_truncated_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ledger\.json"):
        Ledger.load(path)


def test_edits_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "ledger.json"
    with edit(path, new=Ledger(two())) as opened:
        opened.ledger = opened.ledger.then(add, [corpus("c", 9)])
    assert len(Ledger.load(path).history.corpora) == 3
    before = path.read_bytes()
    with pytest.raises(DataError, match="no corpus 'z'"), edit(path) as opened:
        opened.ledger = opened.ledger.then(remove, ["c"])
        opened.ledger = opened.ledger.then(remove, ["z"])
    assert path.read_bytes() == before

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"), edit(path) as opened:
        patch.setattr("os.fsync", full_disk)
        opened.ledger = opened.ledger.then(remove, ["c"])
    assert path.read_bytes() == before and [found.name for found in path.parent.iterdir()] == ["ledger.json"]
    with pytest.raises(DataError, match=r"cannot read .*none\.json: No such file"), edit(tmp_path / "none.json"):
        pass


def _add_one(path: Path, number: int) -> None:
    while True:
        try:
            with edit(path) as opened:
                opened.ledger = opened.ledger.then(add, [corpus(f"new{number}", 9)])
            return
        except DataError as error:
            assert "another job is writing" in str(error), error


@pytest.mark.timeout(60)
def test_no_append_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    Ledger(two()).save(path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_one, args=(path, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=40)
        assert process.exitcode == 0
    assert {entry.name for entry in Ledger.load(path).history.corpora} == {
        "a",
        "b",
        *(f"new{number}" for number in range(6)),
    }


# ---- corpora on disk ----


def documents(first: int, count: int = 40) -> list[list[int]]:
    """Documents of up to 30 tokens, no two of them and no two tokens alike."""
    return [list(range(first + 30 * n, first + 30 * n + n % 30)) for n in range(count)]


def tokens_of(ledger: Ledger, begin: int, end: int) -> Counter[int]:
    """How often each token is predicted by some samples."""
    corpora, found, epochs = OpenCorpora(ledger), Counter[int](), {}
    for position in range(begin, end):
        number, epoch, sample = ledger.history.schedule.locate(position)
        if (number, epoch) not in epochs:
            epochs[number, epoch] = ledger.packed(number, epoch, corpora[number])
        found.update(epochs[number, epoch].tokens(sample)[1:].tolist())
    return found


def test_a_run_reads_each_token_of_its_corpora_once(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", documents(0)), write(tmp_path / "b", documents(2000), np.int32)]
    ledger = Ledger.create(prefixes, sequence_length=8, seed=5)
    grown = ledger.append([write_megatron(tmp_path / "c", [[text] for text in documents(4000)])], domain="old")
    run = grown.then(apply_pending, 50)
    assert [(entry.name, entry.domain) for entry in run.history.corpora] == [
        ("a", "default"),
        ("b", "default"),
        ("c", "old"),
    ]
    found = tokens_of(run, 0, int(run.history.schedule.capacity()))
    assert set(found.values()) == {1} and len(found) == 8 * run.history.schedule.capacity()
    assert tokens_of(run, 0, 50) == tokens_of(ledger, 0, 50)
    halves = tokens_of(run, 0, 77) + tokens_of(run, 77, int(run.history.schedule.capacity()))
    assert halves == found


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger.create([write(tmp_path / "a", documents(0))], sequence_length=8, seed=5, epochs=2)
    corpus_a, half = OpenCorpora(ledger)[0], ledger.history.samples(0)
    first, second = (ledger.packed(0, epoch, corpus_a) for epoch in range(2))
    alike = sum(np.array_equal(first.tokens(n), second.tokens(n)) for n in range(half))
    assert alike < half / 4 and ledger.history.schedule.capacity() == 2 * half


def test_the_same_corpus_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "a", documents(0))
    ledger = Ledger.create([tmp_path / "a"], sequence_length=8, seed=5)
    same = write(tmp_path / "elsewhere", documents(0))
    for suffix in (".json", None):  # with a manifest, and without
        with pytest.raises(DataError, match=f"{same} is in the ledger already, as a "):
            ledger.append([same])
        if suffix:
            Path(same + suffix).unlink()
    assert ledger.append([same], on_duplicate="skip") == ledger
    with pytest.raises(DataError, match=r"2 names \(x, y\) were given for 1 corpora"):
        ledger.append([same], names=["x", "y"])
    with pytest.raises(DataError, match=r"the domain of .* is ''"):
        ledger.append([write(tmp_path / "b", documents(3000))], domain="")
    with pytest.raises(DataError, match=r"the prefix of .* must be a text that is not empty, in UTF-8"):
        ledger.append([tmp_path / "b\udcff"])  # a path of bytes that are no UTF-8


@pytest.mark.parametrize("change", ["content", "tokens", "documents", "missing"])
def test_a_corpus_that_changed_is_refused(tmp_path: Path, change: str) -> None:
    prefix = write(tmp_path / "a", documents(0))
    ledger = Ledger.create([prefix], sequence_length=8, seed=5)
    for path in tmp_path.iterdir():
        path.unlink()
    other = documents(0)
    if change == "content":
        other[5][0] = 7
    elif change == "tokens":
        other[5].append(7)
    elif change == "documents":
        other.append([])
    if change == "missing":
        with pytest.raises(DataError, match=r"cannot read .*a\.idx"):
            OpenCorpora(ledger)
        return
    write(tmp_path / "a", other)
    with pytest.raises(DataError, match=f"corpus a has changed since it was added .*: {change} of {prefix} is"):
        OpenCorpora(ledger)


def test_ids_of_a_corpus_without_a_manifest_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_megatron(tmp_path / "a", [[text] for text in documents(0)])
    ledger = Ledger.create([prefix], sequence_length=8, seed=5)
    assert ledger.history.corpora[0].max_id == 30 * 39 + 8
    scans: list[str] = []
    monkeypatch.setattr(ledger_corpora, "refuse_ids", lambda corpus, vocab_size: scans.append(corpus.prefix))
    OpenCorpora(ledger, 1179)
    assert not scans
    OpenCorpora(ledger, 1178)  # the scan names the first
    unknown = dataclasses.replace(ledger.history.corpora[0], max_id=None)
    OpenCorpora(ledger.then(dataclasses.replace, corpora=(unknown,)), 1179)
    assert scans == [prefix, prefix]


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", [[[5, -3] * 20]], np.int32)
    with pytest.raises(DataError, match=r"token id -3 .in document 0."):
        Ledger.create([prefix], sequence_length=8, seed=5)


def test_a_copy_needs_the_files_next_to_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.json"
    Ledger.create([write(tmp_path / "a", documents(0))], sequence_length=8, seed=5).save(path)
    with edit(path) as opened:
        new = write(tmp_path / "b", [*documents(0, 20), *documents(3000)])
        opened.ledger = opened.ledger.append([new], drop_duplicates=True)
    (tmp_path / "branch").mkdir()
    for name in path.parent.iterdir():
        shutil.copy(name, tmp_path / "branch")
    assert len(OpenCorpora(Ledger.load(tmp_path / "branch" / "ledger.json"))) == 2


def test_a_removed_corpus_may_be_gone(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", documents(0)), write(tmp_path / "b", documents(2000))]
    ledger = Ledger.create(prefixes, sequence_length=8, seed=5).then(remove, ["a"]).then(apply_pending, 20)
    for path in tmp_path.glob("a.*"):
        path.unlink()
    corpora = OpenCorpora(ledger)
    assert isinstance(corpora[1], IndexedCorpus) and len(corpora) == 2
    with pytest.raises(DataError, match="cannot read"):
        corpora[0]


def test_corpora_next_to_the_ledger_move_with_it(tmp_path: Path) -> None:
    prefix = write(tmp_path / "old" / "a", documents(0))
    text = dumps(Ledger.create([prefix], sequence_length=8, seed=5).history).replace(prefix, "a")
    (tmp_path / "old" / "ledger.json").write_text(text)
    (tmp_path / "old").rename(tmp_path / "new")
    assert (
        OpenCorpora(Ledger.load(tmp_path / "new" / "ledger.json"))[0].tokens == open_indexed(tmp_path / "new/a").tokens
    )


def test_settings_and_ledger_name_the_same_corpora(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / name, documents(2000 * n)) for n, name in enumerate("abc"))
    ledger = Ledger.create([a, b], sequence_length=8, seed=5).append([c])
    ledger.check_began_with([a, b])
    ledger.check_began_with([c, write(tmp_path / "copy", documents(0)), b])
    with pytest.raises(DataError, match=r"other is not in the ledger, which has .*data append"):
        ledger.check_began_with([a, b, write(tmp_path / "other", documents(9000))])
    removed = ledger.then(remove, ["a"])
    removed.check_began_with([b])
    removed.check_began_with([a, b])
    with pytest.raises(DataError, match=rf"began with b \({b}\), which is not among {a}"):
        ledger.check_began_with([a, c])
