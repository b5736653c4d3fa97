"""Going on with an interrupted write: the same bytes, from every moment a kill can leave."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.indexed import open_indexed
from steel_megatron.data.indexed_writer import IndexedWriter
from steel_megatron.errors import DataError
from tests.data.corpora import content, inputs, limited, write


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


def test_going_on_within_a_commit(tmp_path: Path) -> None:
    """As above, from every state of the folder that a kill within commit leaves, also over an older corpus."""
    with IndexedWriter(tmp_path / "new" / "x", np.uint16) as writer:
        add(writer, [[1, 2], [3]], 1)
        state = writer.state()
        add(writer, [[4]], 3)
        writer.finalize({"inputs": inputs(3)})
    new = content(tmp_path / "new" / "x")
    old = content(write(tmp_path / "old" / "x", [[7, 8], [9], [9]], rows=[1, 2, 3], inputs=inputs(3)))
    for renamed in range(5):
        files = {".bin": old[".bin"]} | {f"{suffix}.partial": new[suffix] for suffix in new}
        for suffix in (".bin", ".idx", ".rows.npy", ".json")[:renamed]:
            files[suffix] = files.pop(f"{suffix}.partial")
        folder = tmp_path / str(renamed)
        folder.mkdir()
        for suffix, bytes_ in files.items():
            (folder / f"x{suffix}").write_bytes(bytes_)
        with IndexedWriter(folder / "x", np.uint16, overwrite=True, state=state) as writer:
            add(writer, [[4]], 3)
            writer.finalize({"inputs": inputs(3)})
        assert content(folder / "x") == new


def test_going_on_after_kills_at_random_moments(tmp_path: Path) -> None:
    """A process that notes its state now and then is ended by a timer, again and again, until it is done."""
    code = (
        "import json, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from steel_megatron.data.indexed_writer import IndexedWriter\n"
        "from steel_megatron.errors import DataError\n"
        "from steel_megatron.files import write_atomically\n"
        "note = Path(sys.argv[1]).parent / 'note' / 'state'\n"
        "state = json.loads(note.read_text()) if note.exists() else None\n"
        "if float(sys.argv[2]):\n"
        "    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))\n"
        "with IndexedWriter(sys.argv[1], 'uint16', state=state, block_bytes=1024) as writer:\n"
        "    while writer.documents < 3000:\n"
        "        ids = np.arange(writer.documents % 37)\n"
        "        writer.add_documents(ids, [len(ids)], [writer.documents + 1])\n"
        "        if writer.documents % 50 == 0:\n"
        "            write_atomically(note, json.dumps(writer.state()).encode(), DataError)\n"
        "    writer.finalize({'inputs': [{'documents': 3000}]})\n"
        "note.unlink()\n"
    )
    kills = 0
    for delay in (0.005, 0.03, 0.06, 0.0):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x"), str(delay)], check=False, timeout=60)
        assert done.returncode in (0, -signal.SIGALRM)
        kills += done.returncode != 0
        if done.returncode == 0:
            break
    assert kills
    documents = [list(range(number % 37)) for number in range(3000)]
    write(tmp_path / "whole" / "x", documents, block_bytes=1024, rows=range(1, 3001), inputs=[{"documents": 3000}])
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
        "from steel_megatron.data.indexed_writer import IndexedWriter\n"
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
