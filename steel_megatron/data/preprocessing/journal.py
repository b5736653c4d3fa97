"""What an interrupted preprocessing job needs to go on: which job it was, and how far it had come on disk."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from steel_megatron.data.indexed.format import partial
from steel_megatron.data.preprocessing.encoder import Skipped
from steel_megatron.data.reading.documents import Input
from steel_megatron.data.reading.formats import check_size
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, remove, sync_folder, with_suffix, write_atomically
from steel_megatron.log import get_logger

FORMAT = "steel-megatron-preprocess-2"
"""Name and version of the journal."""

_FIELDS = {"job", "overwrite", "position", "outputs", "skipped_bytes", "skipped_rows", "token_counts"}
_SAMPLE = 1 << 16
"""Bytes at each end of an input that enter its fingerprint."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class InputFile:
    """An input and what tells whether it is still the same."""

    path: str
    source: str
    bytes: int
    mtime_ns: int
    fingerprint: str
    """SHA-256 (hex) of size, first and last 64 KiB."""

    def check_unchanged(self) -> None:
        """Raise a DataError when the file is not of the size and age it was."""
        with disk_errors("read", Path(self.path), DataError):
            now = os.stat(self.path)
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.mtime_ns):
            raise DataError(
                f"{self.path} changed while it was read ({self.bytes:,} bytes then, {now.st_size:,} now); start again "
                "when it is complete"
            )


def examine(found: Input) -> InputFile:
    """Look at an input.

    Raises:
        DataError: it cannot be read, is too large for one document, or its path cannot be written down.
    """
    try:
        str(found.path).encode()
    except UnicodeEncodeError:
        raise DataError(f"the path {str(found.path)!r} is not valid UTF-8; rename the file or its folder") from None
    with disk_errors("read", found.path, DataError), found.path.open("rb") as file:
        status = os.fstat(file.fileno())
        check_size(found.path, status.st_size)
        digest = hashlib.sha256(f"{status.st_size}\n".encode())
        digest.update(file.read(_SAMPLE))
        file.seek(max(file.tell(), status.st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return InputFile(str(found.path), found.source, status.st_size, status.st_mtime_ns, digest.hexdigest())


class Journal:
    """``<prefix>.progress.json``: there while a job is unfinished."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = with_suffix(prefix, ".progress.json")

    def read(self) -> dict[str, Any] | None:
        """What an earlier job noted; None if there is none. ``token_counts`` is an int64 array [vocabulary].

        Raises:
            DataError: it is damaged.
        """
        if not self.path.exists():
            return None
        with disk_errors("read", self.path, DataError):
            content = self.path.read_bytes()
        try:
            noted = json.loads(content)
            if noted["format"] != FORMAT:
                raise ValueError(f"format {noted['format']!r}, not {FORMAT!r}")
            if missing := _FIELDS - set(noted):
                raise ValueError(f"without {', '.join(sorted(missing))}")
            noted["token_counts"] = _unpacked(noted["token_counts"])
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise DataError(
                f"{self.path}, the notes of an unfinished job, cannot be used ({error!r}); start again with overwrite"
            ) from error
        return noted

    def write(self, noted: Mapping[str, Any]) -> None:
        """Replace the notes.

        Raises:
            DataError: the disk is full.
        """
        content = {"format": FORMAT, **noted, "token_counts": _packed(noted["token_counts"])}
        write_atomically(self.path, json.dumps(content).encode(), DataError)

    def remove(self) -> None:
        """Remove the notes of a job that is done, and what a job left that was killed while it wrote some."""
        with disk_errors("remove", self.path, DataError):
            self.path.unlink(missing_ok=True)
            for unfinished in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.partial"):
                unfinished.unlink(missing_ok=True)


def _packed(counts: np.ndarray) -> str:
    """Counts [vocabulary] as text; of 150,000 tokens, some 400 KB in 10 ms."""
    return base64.b64encode(zlib.compress(counts.astype("<i8").tobytes(), 1)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)


def differences(noted: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two jobs, in words; nested by path (``tokenizer.fingerprint``)."""
    found = []
    for name in {**noted, **now}:
        before, after = noted.get(name), now.get(name)
        if name == "inputs":
            found += _changed_inputs(before or [], after or [])
        elif isinstance(before, dict) and isinstance(after, dict):
            found += [f"{name}.{difference}" for difference in differences(before, after)]
        elif before != after:
            found.append(f"{name} was {before}, is {after}")
    return found


def _changed_inputs(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    was, now = ({entry["path"]: entry for entry in entries} for entries in (before, after))
    found = [f"{path} is no longer among the inputs" for path in was if path not in now]
    found += [f"{path} was not among the inputs" for path in now if path not in was]
    for path in was:
        if path in now and was[path] != now[path]:
            found += [f"{path}: {difference}" for difference in differences(was[path], now[path])]
    if not found and list(was) != list(now):
        found.append("the inputs come in another order")
    return found


class SkippedRows:
    """Lists skipped rows in ``<prefix>_skipped.jsonl``, which appears when it is committed, and only if there are any.

    Args:
        prefix: of the job.
        length: bytes that an interrupted job noted; what it wrote after them is cut off.

    Raises:
        DataError: the interrupted file is shorter than that, or cannot be opened.
    """

    def __init__(self, prefix: str, length: int = 0) -> None:
        self.path = with_suffix(prefix, "_skipped.jsonl")
        self._partial = partial(self.path)
        self._file: IO[bytes] | None = None
        if length:
            with disk_errors("go on with", self._partial, DataError):
                if not self._partial.exists() and self.path.exists():  # killed after it was committed
                    self.path.replace(self._partial)
                self._file = self._partial.open("r+b")
                if os.fstat(self._file.fileno()).st_size < length:
                    raise DataError(f"{self._partial} is shorter than the {length:,} bytes that were noted")
                self._file.truncate(length)
                self._file.seek(length)

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Append rows.

        Raises:
            DataError: the disk is full.
        """
        with disk_errors("write", self.path, DataError):
            for entry in skipped:
                if self._file is None:
                    self._file = self._partial.open("wb")
                line = json.dumps({**asdict(entry.row), "key": entry.key}, ensure_ascii=False)
                self._file.write(line.encode() + b"\n")

    def length(self) -> int:
        """Bytes written; they are on disk when this returns."""
        if self._file is None:
            return 0
        with disk_errors("write", self.path, DataError):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def commit(self) -> None:
        """Give the list its final name; removes that of an earlier run."""
        with disk_errors("write", self.path, DataError):
            if self._file is None:
                self.path.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)
                return
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
            sync_folder(self.path.parent)
        _log.warning(f"rows were skipped; they are listed in {self.path}")

    def close(self, keep: bool) -> None:
        """Leave the list to a job that goes on, or remove it."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # the rest of the buffer on a full disk, which was not noted either
                _log.debug(f"{self._partial}: {error.strerror}")
        if not keep:
            remove(self._partial)
