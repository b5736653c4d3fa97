"""Watches what code asks of the file system, and ends it before any such call, as a kill or a full disk does."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

_CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
_KILLED = 77


@dataclass(frozen=True)
class Call:
    """A call that changes names or puts something on the disk; ``to`` is the new name."""

    name: str
    path: Path
    to: Path | None = None


def _path(of: Any, folder: int | None) -> Path:
    """The path behind a name, which may be relative to an open folder, or behind a descriptor."""
    if isinstance(of, int):
        return Path(os.readlink(f"/proc/self/fd/{of}"))
    name = os.fsdecode(of)
    return Path(os.path.abspath(name)) if folder is None else _path(folder, None) / name


@contextmanager
def before_each_call(see: Callable[[Call], None]) -> Iterator[None]:
    """Show each call of this process before it is made; what ``see`` raises comes out of the call."""

    def shown(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any, *more: Any, **named: Any) -> Any:
            to = _path(more[0], named.get("dst_dir_fd")) if name in ("replace", "rename") else None
            see(Call(name, _path(path, named.get("dir_fd", named.get("src_dir_fd"))), to))
            return call(path, *more, **named)

        return asked

    with mock.patch.multiple(os, **{name: shown(name, getattr(os, name)) for name in _CALLS}):
        yield


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _state(path: Path) -> object:
    """What a sync puts on the disk: the names in a folder, the content of a file."""
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


class Watch:
    """The calls of some code, held to what a power failure may leave.

    A failure keeps what was synced, of everything else any part. So what gets a name must be synced before, down to
    the last folder in it, and the folder of the new name after.

    Attributes:
        calls: all calls below the folder that is watched.
        faults: what is wrong with their order, in words.
    """

    def __init__(self, folder: Path) -> None:
        self.calls: list[Call] = []
        self.faults: list[str] = []
        self._folder = folder.resolve()
        self._on_disk = {_identity(path): _state(path) for path in (folder, *folder.rglob("*"))}
        self._renamed: dict[Path, Path] = {}  # folders with names that are not synced yet

    def see(self, call: Call) -> None:
        """Take a call into account that is about to be made."""
        if self._folder not in (call.path, *call.path.parents):
            return
        self.calls.append(call)
        if call.name == "fsync":
            self._on_disk[_identity(call.path)] = _state(call.path)
            self._renamed.pop(call.path, None)
        elif call.to is not None:
            for moved in (call.path, *call.path.rglob("*")):
                if self._on_disk.get(_identity(moved)) != _state(moved):
                    self.faults.append(f"{moved} got the name {call.to} before it was synced")
            self._renamed[call.to.parent] = call.to

    def forget(self, path: Path) -> None:
        """Take a file or folder for one that was written just now."""
        for inside in (path, *path.rglob("*")):
            self._on_disk.pop(_identity(inside), None)

    def unsynced(self) -> list[str]:
        """What a power failure may take, below the folder."""
        found = (path for path in self._folder.rglob("*") if self._on_disk.get(_identity(path)) != _state(path))
        return sorted(str(path.relative_to(self._folder)) for path in found)

    def order(self) -> list[str]:
        """The calls in short."""
        return [f"{call.name} {(call.to or call.path).relative_to(self._folder)}" for call in self.calls]

    def end(self) -> None:
        """Nothing more is done."""
        self.faults += [f"{folder} was not synced after {name} got its name" for folder, name in self._renamed.items()]


@contextmanager
def watched(folder: Path) -> Iterator[Watch]:
    """Watch what this process does below a folder, where everything is on the disk so far."""
    watch = Watch(folder)
    with before_each_call(watch.see):
        yield watch
    watch.end()


class Killed(BaseException):
    """Nothing that a process does after this has an effect."""


def killed_before(number: int, work: Callable[[], Any]) -> bool:
    """Work as if the process were killed before the ``number``-th call; whether it came so far.

    What is done to clean up fails, and releases locks. Buffers are flushed, as if the kill had come a little later.
    """
    left = number

    def count(call: Call) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed(call)
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    try:
        with before_each_call(count):
            work()
    except BaseException:
        if left > 0:
            raise
    return left <= 0


def child_killed_before(number: int, work: Callable[[], Any]) -> bool:
    """The same in a child that is really killed; takes a tenth of a second."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, _KILLED), f"the child ended with {code}"
        return code == _KILLED
    left = number

    def count(call: Call) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(_KILLED)  # runs no cleanup and flushes no buffer

    try:
        with before_each_call(count):
            work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@contextmanager
def full_disk_at(number: int) -> Iterator[None]:
    """The ``number``-th sync or rename, and all after it, fail as on a full disk; removing works."""
    left = number

    def fail(call: Call) -> None:
        nonlocal left
        left -= call.name in ("fsync", "replace", "rename")
        if left <= 0 and call.name in ("fsync", "replace", "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with before_each_call(fail):
        yield
