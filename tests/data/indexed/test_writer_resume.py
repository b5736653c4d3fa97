"""Going on with an interrupted write: the same bytes, from every moment a kill can leave."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically
from tests.data.corpora import content, inputs, limited, write
from tests.file_system import killed_before, watched


def add(writer: IndexedWriter, documents: list[list[int]], first_row: int) -> None:
    """Add documents with the rows from ``first_row`` on."""
    ids = np.array([token for document in documents for token in document], np.int64)
    rows = np.arange(first_row, first_row + len(documents))
    writer.add_documents(ids, [len(document) for document in documents], rows)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), max_size=30), min_size=1, max_size=12),
    noted=st.integers(0, 12),
    written=st.integers(0, 12),
    moment=st.sampled_from(["write", "prepare", "commit"]),
    block_bytes=st.sampled_from([8, 64, 1 << 26]),
)
def test_going_on_from_a_state_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    noted: int,
    written: int,
    moment: str,
    block_bytes: int,
) -> None:
    """A job that notes a state, writes more, and ends at any moment, is gone on with from that state."""
    folder = tmp_path_factory.mktemp("any")
    about = {"inputs": inputs(len(documents))}
    with IndexedWriter(folder / "whole" / "x", np.uint16, block_bytes=block_bytes) as writer:
        add(writer, documents, 1)
        writer.finalize(about)
    noted = min(noted, len(documents))
    between = documents[noted : noted + written]
    with IndexedWriter(folder / "x", np.uint16, block_bytes=block_bytes) as writer:
        add(writer, documents[:noted], 1)
        state = json.loads(json.dumps(writer.state()))
        add(writer, between, 1 + noted)
        if moment != "write":
            writer.prepare({"inputs": inputs(writer.documents)})
        if moment == "commit":
            writer.commit()
        else:
            writer.suspend()
    with IndexedWriter(folder / "x", np.uint16, state=state) as writer:
        assert (writer.documents, writer.tokens) == (noted, sum(map(len, documents[:noted])))
        if moment == "commit":
            with pytest.raises(DataError):  # what was committed too early is taken back
                open_indexed(folder / "x")
        add(writer, documents[noted:], 1 + noted)
        writer.finalize(about)
    assert content(folder / "x") == content(folder / "whole" / "x")


def complete(prefix: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write three documents, or go on with them; returns the state after two."""
    with IndexedWriter(prefix, np.uint16, overwrite=True, state=state) as writer:
        if state is None:
            add(writer, [[1, 2], [3]], 1)
        noted = writer.state()
        add(writer, [[4]], 3)
        writer.finalize({"inputs": inputs(3)})
    return noted


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_going_on_after_a_kill_at_any_moment(tmp_path: Path, old: bool) -> None:
    """A write is killed before each of its calls, over an older corpus or none, and so is the one that goes on."""
    with watched(tmp_path) as watch:
        state = complete(tmp_path / "new" / "x")
    told = watch.order().index("fsync new")  # the state is told, and on the disk
    new = content(tmp_path / "new" / "x")
    for number in itertools.count(told + 2):
        begun = tmp_path / str(number)
        begun.mkdir()
        if old:
            write(begun / "x", [[7, 8], [9], [9]], rows=[1, 2, 3], inputs=inputs(3))
        killed = killed_before(number, functools.partial(complete, begun / "x"))
        again = begun / "again" / "x"
        for number_again in itertools.count(1 + number % 3, 3):  # not each after each: that would take long
            shutil.copytree(begun, again.parent, ignore=shutil.ignore_patterns("again"))
            killed_again = killed_before(number_again, functools.partial(complete, again, state))
            complete(again, state)
            assert content(again) == new, (number, number_again)
            shutil.rmtree(again.parent)
            if not killed_again:
                break
        if not killed:
            break
    assert number > 20


def test_going_on_after_kill_upon_kill(tmp_path: Path) -> None:
    """A job that notes its state now and then is killed again and again, a little later each time."""
    note, documents = tmp_path / "note" / "state", [list(range(number % 37)) for number in range(400)]

    def job() -> None:
        state = json.loads(note.read_text()) if note.exists() else None
        with IndexedWriter(tmp_path / "x", np.uint16, state=state, block_bytes=1024) as writer:
            while writer.documents < len(documents):
                add(writer, [documents[writer.documents]], writer.documents + 1)
                if writer.documents % 10 == 0:
                    write_atomically(note, json.dumps(writer.state()).encode(), DataError)
            writer.finalize({"inputs": inputs(len(documents))})
        note.unlink()

    for calls in itertools.count(5):
        if not killed_before(calls, job):
            break
    assert calls > 15
    write(tmp_path / "whole" / "x", documents, block_bytes=1024, rows=range(1, 401), inputs=inputs(400))
    assert content(tmp_path / "x") == content(tmp_path / "whole" / "x")


def interrupted(folder: Path) -> dict[str, Any]:
    """Leave an interrupted write of 20 documents in a folder; returns its state."""
    with IndexedWriter(folder / "x", np.uint16, block_bytes=64) as writer:
        add(writer, [[number] * 5 for number in range(20)], 1)
        state = writer.state()
        writer.suspend()
    return state


def _flip(path: Path, at: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not what was noted"),
        (".bin", lambda path: _flip(path, -1), "is not what was noted"),
        (".bin", lambda path: path.unlink(), r"cannot go on with .*x\.bin\.partial: No such file"),
        (".idx", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is shorter than the 114 bytes"),
        (".idx", lambda path: path.unlink(), r"cannot go on with .*x\.idx\.partial: No such file"),
        (".rows.npy", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is shorter than the 288 bytes"),
    ],
)
def test_damaged_partial_files_are_refused_and_left_alone(
    tmp_path: Path, suffix: str, damage: Any, message: str
) -> None:
    state = interrupted(tmp_path)
    damage(tmp_path / f"x{suffix}.partial")
    before = content(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        IndexedWriter(tmp_path / "x", np.uint16, state=state)
    assert content(tmp_path / "x") == before
    write(tmp_path / "x", [[1]])  # starting again
    assert set(content(tmp_path / "x")) == {".bin", ".idx", ".json"}


def test_damage_of_lengths_is_found_at_the_end(tmp_path: Path) -> None:
    state = interrupted(tmp_path)
    _flip(tmp_path / "x.idx.partial", -4)
    with (
        IndexedWriter(tmp_path / "x", np.uint16, state=state) as writer,
        pytest.raises(DataError, match=r"x\.idx\.partial was damaged .* 198 bytes together, 200 were written"),
    ):
        writer.prepare({"inputs": inputs(20)})
    assert not content(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": "many"}, "noted state of .* is damaged"),
        ({"blocks": None}, "noted state of .* is damaged"),
        ({"dtype": "int32"}, "begun with ids as int32, not uint16"),
        ({"tail": "0"}, "is not what was noted"),
        ({"tokens": 1000}, "is not what was noted"),
    ],
)
def test_damaged_states_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = interrupted(tmp_path)
    before = content(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        IndexedWriter(tmp_path / "x", np.uint16, state={**state, **change})
    with pytest.raises(DataError, match="noted state"):
        IndexedWriter(tmp_path / "x", np.uint16, state={})
    assert content(tmp_path / "x") == before


def test_an_older_corpus_is_not_taken_for_the_own(tmp_path: Path) -> None:
    """The partial files of a job that was to replace a corpus were removed by hand; its state is all that is left."""
    write(tmp_path / "x", [[1] * 5] * 20)
    old = content(tmp_path / "x")
    with IndexedWriter(tmp_path / "x", np.uint16, overwrite=True) as writer:
        add(writer, [[2] * 5] * 20, 1)
        state = writer.state()
        writer.suspend()
    for path in tmp_path.glob("*.partial"):
        path.unlink()
    with pytest.raises(DataError, match="is not what was noted"):
        IndexedWriter(tmp_path / "x", np.uint16, overwrite=True, state=state)
    assert content(tmp_path / "x") == old


def test_a_suspended_write_may_be_gone_on_with_at_once_or_thrown_away(tmp_path: Path) -> None:
    state = interrupted(tmp_path)
    assert set(content(tmp_path / "x")) == {".bin.partial", ".idx.partial", ".rows.npy.partial"}
    with IndexedWriter(tmp_path / "x", np.uint16, state=state) as writer:
        assert writer.state() == state
        with pytest.raises(DataError, match="another job"):
            IndexedWriter(tmp_path / "x", np.uint16, state=state)
    assert not content(tmp_path / "x")


def test_a_resumed_write_does_not_replace_a_corpus_unasked(tmp_path: Path) -> None:
    state = interrupted(tmp_path)
    write(tmp_path / "y", [[1]])
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(tmp_path / f"y{suffix}", tmp_path / f"x{suffix}")
    with pytest.raises(DataError, match="exists already"):
        IndexedWriter(tmp_path / "x", np.uint16, state=state)
    assert open_indexed(tmp_path / "x").tokens == 1


def test_a_write_that_was_cut_short_tells_no_state(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        state = writer.state()
        writer.add_tokens(np.array([2, 3]))  # an interrupt here, before the lengths are written
        with pytest.raises(DataError, match="cut short"):
            writer.state()
        writer.suspend()
    with IndexedWriter(tmp_path / "x", np.uint16, state=state) as writer:
        writer.finalize({})
    assert open_indexed(tmp_path / "x").flat.tolist() == [1]


def test_a_state_from_before_the_disk_was_full_is_good(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from steel_megatron.data.indexed.writer import IndexedWriter\n"
        "from steel_megatron.errors import DataError\n"
        "with IndexedWriter(sys.argv[1], 'uint16') as writer:\n"
        "    writer.add_document([1] * 1000)\n"
        "    print(json.dumps(writer.state()))\n"
        "    try:\n"
        "        while True:\n"
        "            writer.add_document([2] * 100)\n"
        "    except DataError:\n"
        "        pass\n"
        "    try:\n"
        "        writer.state()\n"
        "    except DataError:\n"
        "        writer.suspend()\n"
    )
    done = limited(code, str(tmp_path / "x"))
    assert done.returncode == 0, done.stderr
    with IndexedWriter(tmp_path / "x", np.uint16, state=json.loads(done.stdout)) as writer:
        writer.add_document([3])
        writer.finalize({})
    assert open_indexed(tmp_path / "x").flat.tolist() == [1] * 1000 + [3]
