"""Writing the indexed format: whole or not at all."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.data.indexed.dataset import open_indexed, verify
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import DataError
from steel_megatron.files import exclusive_lock, write_atomically
from tests.data.corpora import content, inputs, limited, write
from tests.file_system import full_disk_at, killed_before, watched


def test_nothing_is_left_without_finalize(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
    assert not list(tmp_path.iterdir())


def opened(prefix: Path) -> list[int] | None:
    """The first document of a corpus; None where nothing opens."""
    try:
        return open_indexed(prefix).document(0).tolist()
    except DataError:
        return None


@pytest.mark.parametrize("rows", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_corpus_or_nothing_or_the_new(tmp_path: Path, rows: bool) -> None:
    """The old corpus has the sizes of the new one: only the order of the names keeps them apart."""
    about: dict[str, Any] = {"rows": [1], "inputs": inputs(1)} if rows else {}
    new = content(write(tmp_path / "new" / "x", [[1, 2]], **about))
    old = content(write(tmp_path / "old" / "x", [[3, 4]], rows=[5], inputs=inputs(1)))
    found: list[list[int] | None] = []
    for number in itertools.count(1):
        prefix = tmp_path / str(number) / "x"
        prefix.parent.mkdir()
        for suffix, bytes_ in old.items():
            Path(f"{prefix}{suffix}").write_bytes(bytes_)
        killed = killed_before(number, lambda prefix=prefix: write(prefix, [[1, 2]], overwrite=True, **about))  # type: ignore[misc]
        found.append(opened(prefix))
        write(prefix, [[1, 2]], overwrite=True, **about)
        assert content(prefix) == new, number
        if not killed:
            break
    order = [[3, 4], None, [1, 2]]
    assert [order.index(one) for one in found] == sorted(order.index(one) for one in found)
    assert {order.index(one) for one in found} == {0, 1, 2} and len(found) > 10


def test_what_vouches_for_a_corpus_goes_first_and_comes_last(tmp_path: Path) -> None:
    """After a power failure as well: each step is on the disk before the next one."""
    write(tmp_path / "x", [[3, 4]], rows=[5], inputs=inputs(1))
    with IndexedWriter(tmp_path / "x", np.uint16, overwrite=True) as writer, watched(tmp_path) as watch:
        writer.add_documents(np.array([1, 2]), [2], [1])
        writer.finalize({"inputs": inputs(1)})
    assert not watch.faults
    assert watch.order()[watch.order().index("unlink x.json") :] == [
        *("unlink x.json", "unlink x.idx", "unlink x.rows.npy", "fsync ."),
        *("replace x.bin", "replace x.idx", "replace x.rows.npy", "fsync .", "replace x.json", "fsync ."),
        *("unlink x.bin.partial", "unlink x.idx.partial", "unlink x.rows.npy.partial", "unlink x.json.partial"),
        "unlink x.lock",
    ]


def test_a_full_disk_at_any_sync_or_rename_leaves_nothing_of_a_corpus(tmp_path: Path) -> None:
    for number in itertools.count(1):
        try:
            with full_disk_at(number):
                write(tmp_path / "x", [[1, 2]], rows=[1], inputs=inputs(1))
        except DataError as error:
            assert "No space left on device" in str(error) and not list(tmp_path.iterdir())
            continue
        break
    assert number > 7


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
        "import os, signal, sys; from steel_megatron.data.indexed.writer import IndexedWriter; "
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
        "from steel_megatron.data.indexed.writer import IndexedWriter\n"
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
            writer.finalize({"inputs": inputs(3)})


def test_rows_of_an_older_corpus_do_not_stay(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]], rows=[1], inputs=inputs(1))
    with IndexedWriter(tmp_path / "x", np.uint16, overwrite=True) as writer:
        writer.add_document([2])
        writer.finalize({})
    assert set(content(tmp_path / "x")) == {".bin", ".idx", ".json"}
