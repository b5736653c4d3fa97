"""Files and folders that are there whole or not at all: after a kill, a full disk, a power failure."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steel_megatron import files
from steel_megatron.errors import DataError
from steel_megatron.files import (
    exclusive_lock,
    is_locked,
    lease,
    lease_holder,
    replace_folder,
    sha256_of,
    write_atomically,
)
from steel_megatron.log import setup_logging
from tests.file_system import full_disk_at, killed_before, watched


def happens(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, old: bytes | None) -> None:
    if old is not None:
        (tmp_path / "x").write_bytes(old)
    with watched(tmp_path) as watch:
        write_atomically(tmp_path / "x", b"new", DataError)
    assert not watch.faults
    assert [call.name for call in watch.calls if call.name != "mkdir"] == ["fsync", "replace", "fsync", "unlink"]
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_write_that_is_killed_or_fails_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for number in itertools.count(1):
        path.write_bytes(b"old")
        killed = killed_before(number, lambda: write_atomically(path, b"new", DataError))
        assert path.read_bytes() in (b"old", b"new") and (killed or path.read_bytes() == b"new")
        if not killed:
            break
    assert number > 4
    for left in tmp_path.glob("x.*.partial"):
        left.unlink()
    for number in (1, 2, 3):
        path.write_bytes(b"old")
        with full_disk_at(number), pytest.raises(DataError, match=r"cannot write .*x: No space left on device"):
            write_atomically(path, b"new", DataError)
        assert names(tmp_path) == ["x"] and path.read_bytes() == (b"old" if number < 3 else b"new")


def folder_of(content: bytes, at: Path) -> Path:
    """A folder with folders."""
    for name in ("file", "inner/file", "inner/deep/file"):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)
    return at


def content_of(folder: Path) -> set[bytes] | None:
    """What its files hold; None if it is not there, or not whole."""
    found = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return set(found) if len(found) == 3 else None


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_synced_before_it_gets_its_name(tmp_path: Path, old: bool) -> None:
    if old:
        folder_of(b"old", tmp_path / "final")
    partial = folder_of(b"new", tmp_path / "partial")
    with watched(tmp_path) as watch:
        # What is in it now was written just now: none of it is on the disk.
        watch.forget(partial)
        replace_folder(partial, tmp_path / "final")
    assert not watch.faults
    assert names(tmp_path) == ["final"] and content_of(tmp_path / "final") == {b"new"}
    if old:  # the old one goes when the new one's name is on the disk
        calls = watch.order()
        assert calls.index("fsync .") < min(place for place, call in enumerate(calls) if call.startswith("unlink"))


def one_is_whole(work: Path, old: bool) -> bool:
    """Whether the old or the new folder is whole, under its own name or under that of the moment between."""
    final, aside = work / "final", work / ".final.old"
    if final.exists():
        return content_of(final) in ({b"old"}, {b"new"})
    return content_of(work / "partial") == {b"new"} and (not old or content_of(aside) == {b"old"})


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_while_a_folder_is_replaced(tmp_path: Path, old: bool) -> None:
    """The name is free for a moment, with the old folder beside it; the next call brings either to its end."""

    def killed(work: Path, number: int) -> bool:
        return killed_before(number, lambda: replace_folder(work / "partial", work / "final"))

    for number in itertools.count(1):
        work = tmp_path / str(number)
        folder_of(b"new", work / "partial")
        if old:
            folder_of(b"old", work / "final")
        came = killed(work, number)
        assert one_is_whole(work, old) and (came or content_of(work / "final") == {b"new"})
        if old and not (work / "final").exists():  # the next call may be killed as well
            for again in itertools.count(1):
                second = shutil.copytree(work, work / "again" / str(again), ignore=lambda *_: ["again"])
                came_again = killed(second, again)
                assert one_is_whole(second, old)
                if not came_again:
                    break
            assert again > 7
            shutil.rmtree(work / "again")
        replace_folder(folder_of(b"newer", work / "partial"), work / "final")
        assert names(work) == ["final"] and content_of(work / "final") == {b"newer"}
        if not came:
            break
    assert number > 7


def test_a_hash_is_of_all_of_a_file(tmp_path: Path) -> None:
    content = bytearray(range(256)) * (3 << 12)
    digests = set()
    for place in (0, len(content) // 2, len(content) - 1):
        (tmp_path / "x").write_bytes(content)
        digests.add(sha256_of(tmp_path / "x"))
        content[place] ^= 1
    (tmp_path / "x").write_bytes(content)
    assert len(digests | {sha256_of(tmp_path / "x")}) == 4


def test_a_lock_is_seen_and_looking_at_it_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "run"
    assert not is_locked(prefix)
    (tmp_path / "run.lock").write_text("process 12345678 on a machine with a long name, since yesterday, ")  # of a kill
    with exclusive_lock(prefix, DataError):
        assert is_locked(prefix)
        since = r"since 20..-..-.. ..:..:.. .\d{4}"
        holder = rf"\(process {os.getpid()} on {socket.gethostname()}, {since}, holds {prefix}.lock\)"
        with pytest.raises(DataError, match=holder), exclusive_lock(prefix, DataError):
            pass
        # Neither a program nor another process of Python that is started meanwhile keeps it held.
        descriptors = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
        held = [int(link.name) for link in descriptors if link.readlink() == tmp_path / "run.lock"]
        assert [os.get_inheritable(descriptor) for descriptor in held] == [False]
    (tmp_path / "run.lock").touch()  # left by a kill
    assert not is_locked(prefix)
    looking = os.open(tmp_path / "run.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda seconds: os.close(looking))
    with exclusive_lock(prefix, DataError):
        assert is_locked(prefix)


def left_lease(folder: Path, **holder: object) -> Path:
    """The lease of a process that is gone, of this machine unless something else is said."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    path = folder / "run.lease"
    path.write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1, "boot": boot, **holder}))
    return path


def test_a_lease_is_renewed_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "work" / "run.lease"
    with lease(tmp_path / "work" / "run", DataError, seconds=0.2):
        assert lease_holder(tmp_path / "work" / "run")["process"] == os.getpid()
        os.utime(path, (1, 1))
        assert happens(lambda: path.stat().st_mtime > 1)
    assert names(tmp_path / "work") == []
    with lease(tmp_path / "work" / "run", DataError, seconds=0.2):
        left_lease(tmp_path / "work", host="other")  # which took it over
    assert lease_holder(tmp_path / "work" / "run")["host"] == "other"
    path.unlink()
    with lease(tmp_path / "work" / "run", DataError, seconds=0.05):
        shutil.rmtree(tmp_path / "work")
        time.sleep(0.1)
    assert names(tmp_path) == []


def test_a_lease_of_a_process_that_is_gone_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.Popen(["true"])
    assert happens(lambda: Path(f"/proc/{killed.pid}/stat").read_text().split()[2] == "Z")  # nobody waited for it
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    for process in (killed.pid, 2**22 + 1):
        left_lease(tmp_path, process=process)
        with lease(tmp_path / "run", DataError):
            assert lease_holder(tmp_path / "run")["process"] == os.getpid()
    killed.wait()


@pytest.mark.parametrize("other", [{"host": "node7"}, {"boot": "before"}, {"process": os.getppid()}, {"process": "x"}])
def test_a_lease_that_runs_out_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, object]
) -> None:
    setup_logging()
    path = left_lease(tmp_path, **other)
    with lease(tmp_path / "run", DataError, seconds=0.4):
        assert lease_holder(tmp_path / "run")["process"] == os.getpid()
    said = capsys.readouterr().err
    assert f"waiting to see whether it is renewed again\n{path} of process " in said and "taking it over" in said


def test_a_lease_that_is_renewed_refuses_others(tmp_path: Path) -> None:
    path, ended = left_lease(tmp_path, host="node7", process=12), threading.Event()
    before = path.read_bytes()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(DataError, match=rf"another job is writing to {tmp_path}/run \(process 12 on node7 renews"),
            lease(tmp_path / "run", DataError, seconds=5),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert path.read_bytes() == before
    for content in (b"", b"[]", b"[" * 100_000, b"\xff", b'{"process": null}'):
        path.write_bytes(content)
        os.utime(path, (1, 1))
        with lease(tmp_path / "run", DataError):
            assert lease_holder(tmp_path / "run")["process"] == os.getpid()
        assert not path.exists()


def test_the_disk_begins_once_there_is_enough_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SYNC_BYTES", 8)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(
        files, "_sync_file_range", lambda file, start, size, flags: begun.append((start.value, size.value))
    )
    with (tmp_path / "file").open("wb") as file:
        at = 0
        for expected, size in ((0, 0), (10, 10), (10, 10), (20, 20)):
            file.write(b"12345")
            at = files.begin_sync(file, at)
            assert (at, (tmp_path / "file").stat().st_size) == (expected, size)
    assert begun == [(0, 10), (10, 10)]
