"""Writing the indexed format: whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.data.indexed import open_indexed, verify
from steel_megatron.data.indexed_writer import IndexedWriter
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock, write_atomically
from tests.data.corpora import content, inputs, limited, write


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.prepare({})
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize({})
        raise RuntimeError  # a corpus beside it failed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [False, True])
def test_every_moment_of_a_commit_leaves_nothing_that_opens(tmp_path: Path, rows: bool) -> None:
    """Replays the states of the folder that a crash during commit can leave over an older corpus."""
    about: dict[str, Any] = {"rows": [1], "inputs": inputs(1)} if rows else {}
    new = content(write(tmp_path / "new" / "x", [[1, 2]], **about))
    # The same sizes: only the order of the renames keeps them apart.
    state = content(write(tmp_path / "old" / "x", [[3, 4]], rows=[5], inputs=inputs(1)))
    state |= {f"{suffix}.partial": new[suffix] for suffix in new}
    steps: list[tuple[str, str | None]] = [(".json", None), (".idx", None), (".rows.npy", None)]
    steps += [(f"{suffix}.partial", suffix) for suffix in (".bin", ".idx", ".rows.npy", ".json") if suffix in new]
    for number, (gone, appears) in enumerate(steps):
        moved = state.pop(gone)
        if appears is not None:
            state[appears] = moved
        folder = tmp_path / f"state{number}"
        folder.mkdir()
        for suffix, bytes_ in state.items():
            (folder / f"x{suffix}").write_bytes(bytes_)
        if number == len(steps) - 1:
            assert open_indexed(folder / "x").document(0).tolist() == [1, 2]
        else:
            with pytest.raises(DataError):
                open_indexed(folder / "x")


def test_existing_corpora_are_only_replaced_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    with pytest.raises(DataError, match="exists already"):
        IndexedWriter(tmp_path / "x", np.uint16)
    assert open_indexed(tmp_path / "x").document(0).tolist() == [1]
    with IndexedWriter(tmp_path / "x", np.int32, overwrite=True) as writer:
        writer.add_document([2, 3])
        assert open_indexed(tmp_path / "x").document(0).tolist() == [1]
        writer.finalize({})
    assert verify(tmp_path / "x").tokens == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match="another job is writing to"):
            IndexedWriter(tmp_path / "x", np.uint16, overwrite=True)
        writer.finalize({})
    assert open_indexed(tmp_path / "x").tokens == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from steel_megatron.data.indexed_writer import IndexedWriter; "
        "writer = IndexedWriter(sys.argv[1], 'uint16'); writer.add_document([1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert killed.returncode == -9 and (tmp_path / "x.lock").exists()
    write(tmp_path / "x", [[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails in the same place as a full disk: in write() or in flush()."""
    code = (
        "import sys\n"
        "from steel_megatron.data.indexed_writer import IndexedWriter\n"
        "from steel_megatron.errors import DataError\n"
        "try:\n"
        "    with IndexedWriter(sys.argv[1], 'uint16') as writer:\n"
        "        for document in range(int(sys.argv[2])):\n"
        "            writer.add_document([1] * int(sys.argv[3]))\n"
        "        writer.finalize({})\n"
        "except DataError as error:\n"
        "    sys.exit(str(error))\n"
    )
    # The second one fails only when the index is completed.
    for documents, length, suffix in ((100, 100, "bin"), (500, 1, "idx")):
        done = limited(code, str(tmp_path / "x"), str(documents), str(length))
        assert f"cannot write {tmp_path}/x.{suffix}: File too large" in done.stderr and done.returncode == 1
        assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        IndexedWriter(tmp_path / "file" / "x", np.uint16)
    with pytest.raises(DataError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x", b"", DataError)
    write(tmp_path / "new" / "folder" / "x", [[1]])


def test_write_atomically_replaces_and_leaves_no_rest(tmp_path: Path) -> None:
    for written in (b"one", b"two"):
        write_atomically(tmp_path / "x", written, DataError)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", written)]


def test_lock_is_released_and_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive_lock(tmp_path / "x", DataError):
            assert (tmp_path / "x.lock").exists()
            with pytest.raises(DataError, match="another job"), exclusive_lock(tmp_path / "x", DataError):
                pass
        assert not (tmp_path / "x.lock").exists()


def test_rows_are_given_for_all_documents_or_for_none(tmp_path: Path) -> None:
    ids = np.array([1, 2])
    for first, second in (([1, 2], None), (None, [1, 2])):
        with IndexedWriter(tmp_path / "x", np.uint16) as writer:
            writer.add_documents(ids, [1, 1], first)
            with pytest.raises(AssertionError, match="for all documents or for none"):
                writer.add_documents(ids, [1, 1], second)
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(ids[:0], [])  # a chunk without documents says nothing
        writer.add_documents(ids, [1, 1], [1, 2])
        writer.add_documents(ids[:0], [])
        with pytest.raises(AssertionError, match="inputs have 3 documents, 2 were written"):
            writer.prepare({"inputs": inputs(3)})


def test_rows_of_an_older_corpus_do_not_stay(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]], rows=[1], inputs=inputs(1))
    with IndexedWriter(tmp_path / "x", np.uint16, overwrite=True) as writer:
        writer.add_document([2])
        writer.finalize({})
    assert set(content(tmp_path / "x")) == {".bin", ".idx", ".json"}
