"""Where inputs lie: files, remote addresses (through fsspec), standard input and pipes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import stat
import sys
from typing import Any, NamedTuple

from steel_megatron.data.reading.forms import packages_of
from steel_megatron.errors import DataError

STDIN = "-"
PEEKED_BYTES = 1 << 24
"""Of a stream, what can be looked at before it is read."""
_REMOTE_BLOCK = 1 << 22
"""Bytes that are fetched at a time."""


class FileStatus(NamedTuple):
    """What shows whether a file is still the same."""

    size: int
    """Bytes as stored; 0 where nobody knows, as of a stream."""
    mtime_ns: int
    """When it was changed; 0 where nobody knows."""


class StoredFile(NamedTuple):
    """An input that is open for reading."""

    raw: Any
    """A binary file, or what reads like one."""
    size: int
    """Bytes; 0 where nobody knows."""
    seekable: bool
    local: bool
    """Whether it is an ordinary file on this machine, which seeks at no cost."""

    def tell(self) -> int:
        """Bytes that were read so far, if it was read from the beginning on."""
        found: int = self.raw.tell()
        return found

    def close(self) -> None:
        """Close it."""
        self.raw.close()


def is_remote(path: str) -> bool:
    """Whether a path is an address that fsspec opens, such as ``s3://bucket/corpus.jsonl``."""
    return "://" in path


def is_stream(path: str) -> bool:
    """Whether a path is standard input or a pipe, which can be read only once, from its beginning to its end."""
    if path == STDIN or is_remote(path):
        return path == STDIN
    with contextlib.suppress(OSError):
        kind = os.stat(path).st_mode
        return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))
    return False


def status_of(path: str) -> FileStatus:
    """Size and age of an input.

    Raises:
        OSError: it is not there, or may not be read.
        DataError: the driver of a remote address is not installed.
    """
    if is_stream(path):
        return FileStatus(0, 0)
    if not is_remote(path):
        found = os.stat(path)
        return FileStatus(found.st_size, found.st_mtime_ns)
    with remote_errors():
        system, place = file_system(path)
        size = system.info(place).get("size") or 0
        changed = 0
        with contextlib.suppress(NotImplementedError, KeyError, TypeError, AttributeError):
            changed = int(system.modified(place).timestamp() * 1e9)
        return FileStatus(int(size), changed)


def open_input(path: str, peek: bool = False) -> StoredFile:
    """Open an input.

    Args:
        path: a file, an address or a stream.
        peek: of a stream, only look at its beginning.

    Raises:
        OSError: it cannot be read.
        DataError: a package is missing that it takes.
    """
    require_packages(path)
    if is_stream(path):
        pipe = _pipe(path)
        return StoredFile(_Peeked(pipe) if peek else _Taken(path, pipe), 0, False, False)
    if not is_remote(path):
        raw = open(path, "rb")  # noqa: SIM115  (the caller closes it)
        return StoredFile(raw, os.fstat(raw.fileno()).st_size, True, True)
    with remote_errors():
        system, place = file_system(path)
        remote = system.open(place, "rb", block_size=_REMOTE_BLOCK)
        size = getattr(remote, "size", None) or 0
        seekable = size > 0 and remote.seekable()
        return StoredFile(_Remote(remote), size, seekable, False)


def require_packages(path: str) -> None:
    """Refuse an input whose form takes a package that is not installed.

    Raises:
        DataError: names it.
    """
    missing = [package for package in packages_of(path) if not is_installed(package)]
    if missing:
        raise DataError(
            f"reading {path} needs {' and '.join(missing)}, which is not installed: pip install 'steel-megatron[data]'"
        )


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a remote address, and the path in it.

    Raises:
        DataError: its driver is not installed, or nobody knows the protocol.
    """
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return system, place


@contextlib.contextmanager
def remote_errors() -> Any:
    """Whatever a driver raises is an error of the file system: each has errors of its own."""
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote:
    """A remote file whose driver's errors are those of files."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        with remote_errors():
            found: bytes = self._file.read(size)
            return found

    def seek(self, offset: int, whence: int = 0) -> int:
        with remote_errors():
            found: int = self._file.seek(offset, whence)
            return found

    def tell(self) -> int:
        with remote_errors():
            found: int = self._file.tell()
            return found

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        self.closed = True
        self._file.close()


class _Pipe:
    """A stream, and what was read of it ahead."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.head = raw, bytearray()

    def fill(self, size: int) -> None:
        """Have the first bytes ready, as far as there are any."""
        while len(self.head) < size and (block := self.raw.read(size - len(self.head))):
            self.head += block


_pipes: dict[str, _Pipe] = {}
"""Those that were looked at and not read yet."""


def _pipe(path: str) -> _Pipe:
    if path not in _pipes:
        if path == STDIN:
            if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
                raise DataError("the input - is standard input, which is no file and no pipe: name a file")
            _pipes[path] = _Pipe(sys.stdin.buffer)
        else:
            _pipes[path] = _Pipe(open(path, "rb"))  # noqa: SIM115  (until it was read)
    return _pipes[path]


class _Peeked:
    """The beginning of a stream, which stays there."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe, self._at = pipe, 0

    def read(self, size: int) -> bytes:
        stop = min(self._at + size, PEEKED_BYTES)
        self._pipe.fill(stop)
        found = bytes(self._pipe.head[self._at : stop])
        self._at += len(found)
        return found

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """The stream stays open."""


class _Taken:
    """A stream that is read for good."""

    def __init__(self, path: str, pipe: _Pipe) -> None:
        self._pipe, self._at = pipe, 0
        self._close = path != STDIN
        del _pipes[path]

    def read(self, size: int) -> bytes:
        head = self._pipe.head
        if head:
            found = bytes(head[:size])
            del head[:size]
        else:
            found = self._pipe.raw.read(size)
        self._at += len(found)
        return found

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if self._close:
            self._pipe.raw.close()
