"""Files that are there whole or not at all, and locks that end with their process.

Every function that writes takes the kind of error to raise, so that a full disk says whether it hit a corpus or a
checkpoint.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from steel_megatron.errors import SteelError
from steel_megatron.log import get_logger

logger = get_logger(__name__)

_SYNC_BYTES = 1 << 25
"""Written before the disk is told to begin."""
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
_LOCK_SECONDS = 0.05
"""Between two looks whether a lock is free."""
LEASE_SECONDS = 60.0
"""After which a lease that was not renewed has run out."""
_RENEWALS = 6
"""How often a lease is renewed in that time."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What the operating system says of a lock that another process holds."""


@contextmanager
def disk_errors(action: str, path: Path, error_type: type[SteelError]) -> Iterator[None]:
    """Turn what the operating system refuses (disk full, no permission, no folder) into an error of the library.

    Args:
        action: what the block does, such as ``write``, for the message.
        path: what it does that to, for the message.
        error_type: the kind of error.

    Raises:
        SteelError: of the given type; the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise error_type(f"cannot {action} {path}: {error.strerror or error}") from error


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """A path with something appended to its name."""
    return Path(os.fspath(prefix) + suffix)


def moved_with(recorded: str | Path, folder: Path, levels: int = 3) -> list[Path]:
    """Where something may lie that was moved together with a folder.

    Args:
        recorded: its path before the move.
        folder: where the folder is now.
        levels: how many folders above it to look in, and how many of the last names of the path to keep.

    Returns:
        the last names of the path below the folder and the ones above it; the nearest and shortest first.
    """
    names = [name for name in Path(recorded).parts if name not in ("/", "..", ".")]
    above = [Path(os.path.abspath(folder)), *Path(os.path.abspath(folder)).parents][: levels + 1]
    return [base.joinpath(*names[-count:]) for base in above for count in range(1, min(levels, len(names)) + 1)]


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_sync(file: IO[bytes], start: int) -> int:
    """Let the disk begin with what was written to a file, where the system can, once that is worth a call.

    Args:
        file: it is written to, front to back.
        start: where the earlier call ended, in bytes; 0 at first.

    Returns:
        where this one did. The sync that must follow has the less left to wait for.
    """
    end = file.tell()
    if end - start < _SYNC_BYTES:
        return start
    file.flush()
    if _sync_file_range is not None:
        _sync_file_range(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(end - start), 2)
    return end


def remove(path: Path) -> None:
    """Remove a file of a write that failed or is over; that it cannot be removed is not worth a second error."""
    with suppress(OSError):
        path.unlink()


def write_atomically(path: str | Path, content: bytes, error_type: type[SteelError]) -> None:
    """Write a file that is there complete or not at all, also after a crash; what it replaces hands down its mode.

    Args:
        path: the file; folders above it are made.
        content: all that it is to hold.
        error_type: the kind of error.

    Raises:
        SteelError: of the given type; the disk is full, or the folder cannot be made or written to.
    """
    path = Path(path)
    temporary = with_suffix(path, f".{uuid.uuid4().hex}.partial")  # processes of several machines may write at once
    with disk_errors("write", path, error_type), ExitStack() as cleanup:
        path.parent.mkdir(parents=True, exist_ok=True)
        cleanup.callback(remove, temporary)
        with temporary.open("wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, in place of an earlier one; all that is in it is synced to disk first."""
    for path in (*partial.rglob("*"), partial):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():  # an earlier call was killed between its two renames
        os.replace(old, final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    sync_folder(final.parent)  # before the earlier one goes
    shutil.rmtree(old, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(prefix: str | Path, error_type: type[SteelError], wait: float = 0.0) -> Iterator[None]:
    """Hold ``<prefix>.lock``, so that no second job writes under the same prefix.

    The lock ends with the process, however that ends, and programs that it starts do not inherit it. Its file says who
    holds it, and is removed when the block is left.

    Args:
        prefix: what is written.
        error_type: the kind of error.
        wait: seconds to wait for a job that holds it.

    Raises:
        SteelError: of the given type; another job holds it, or the folder cannot be made or written to.
    """
    path, told = with_suffix(prefix, ".lock"), not wait
    until = time.monotonic() + max(wait, _LOCK_SECONDS)  # is_locked() of another process may have it for a moment
    made = [folder for folder in path.parents if not folder.exists()]
    while (descriptor := _locked(path, error_type)) is None:
        if time.monotonic() >= until:
            raise error_type(f"another job is writing to {prefix} ({_holder(path)}); wait or choose another name")
        if not told:
            logger.info(f"waiting for another job that is writing to {prefix} ({_holder(path)})")
        told = True
        time.sleep(_LOCK_SECONDS)
    try:
        with suppress(OSError):  # a full disk, or a file of another user
            os.ftruncate(descriptor, 0)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started},".encode())
        try:
            yield
        finally:
            remove(path)
    finally:
        os.close(descriptor)
        with suppress(OSError):  # folders that were made for work that then wrote nothing
            for folder in made:
                folder.rmdir()


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    with suppress(OSError):
        return f"{path.read_text(encoding='utf-8', errors='replace') or 'it'} holds {path}"
    return f"it holds {path}"


def is_locked(prefix: str | Path) -> bool:
    """Whether a process holds :func:`exclusive_lock` of ``prefix``; False where the file system does not tell."""
    try:
        descriptor = os.open(with_suffix(prefix, ".lock"), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path, error_type: type[SteelError]) -> int | None:
    """The descriptor of a lock file that this process holds now; None when another one does."""
    with disk_errors("write", path, error_type):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY)  # another user's, left by a kill: it can be locked all the same
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder may have removed this very file between our opening and locking it.
        ours = os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError as error:
        ours = error.errno not in (*_HELD, errno.ENOENT)
        if ours:  # some cluster file systems know no locks
            logger.warning(f"{path} cannot be locked ({error.strerror}); make sure that no other job writes there")
    if ours:
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def lease(prefix: str | Path, error_type: type[SteelError], seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold ``<prefix>.lease``, a file that is renewed all the time, for file systems whose locks other machines miss.

    The lease of a process that is gone from this machine is taken over at once; another one is watched: if it is
    renewed, its job is alive, and if it runs out, it is taken over with a warning.

    Args:
        prefix: what is written.
        error_type: the kind of error.
        seconds: after which a lease that was not renewed has run out.

    Raises:
        SteelError: of the given type; another job renews its lease, or the file cannot be written.
    """
    path, token = with_suffix(prefix, ".lease"), uuid.uuid4().hex
    _await_lease(path, prefix, error_type, seconds)
    holder = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot_id(), "token": token}
    write_atomically(path, json.dumps(holder).encode(), error_type)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / _RENEWALS):
            with suppress(OSError):  # the folder may be gone, which is not for this thread to say
                os.utime(path)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if lease_holder(prefix).get("token") == token:
            remove(path)


def lease_holder(prefix: str | Path) -> dict[str, object]:
    """Who holds :func:`lease` of ``prefix``: ``host``, ``process``, ``boot``; empty where nobody does."""
    try:
        found = json.loads(with_suffix(prefix, ".lease").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _await_lease(path: Path, prefix: str | Path, error_type: type[SteelError], seconds: float) -> None:
    """Return once a lease may be taken."""
    first: float | None = None
    while True:
        with disk_errors("read", path, error_type):
            try:
                renewed = path.stat().st_mtime
            except FileNotFoundError:
                return
            age = _now_of(path.parent) - renewed
        holder = lease_holder(prefix)
        who = f"process {holder.get('process')} on {holder.get('host')}"
        here = holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id()
        process = holder.get("process")
        if here and isinstance(process, int) and not _is_alive(process):
            return
        if age > seconds:
            logger.warning(f"{path} of {who} was not renewed for {age:.0f} s; taking it over")
            return
        if first is None:
            first = renewed
            logger.info(f"{path} of {who} was renewed {age:.0f} s ago; waiting to see whether it is renewed again")
        elif renewed != first:
            raise error_type(f"another job is writing to {prefix} ({who} renews {path}); wait or choose another name")
        time.sleep(min(1.0, seconds / 20))


def _is_alive(process: int) -> bool:
    """Whether a process of this machine is there, and not only waits for its parent to notice its end."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def _now_of(folder: Path) -> float:
    """The time by the clock of a file system, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _boot_id() -> str:
    """Of this start of this machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
