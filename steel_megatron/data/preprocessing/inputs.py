"""The input files of a preprocessing job, and how a change is detected."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.data.reading.formats import check_size
from steel_megatron.data.reading.inputs import Input
from steel_megatron.data.reading.storage import is_stream, open_input, status_of
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors

_SAMPLE = 1 << 16
"""Bytes at each end of an input that enter its fingerprint."""


@dataclass(frozen=True)
class InputFile:
    """An input and what shows whether it is still the same."""

    path: str
    source: str
    bytes: int
    mtime_ns: int
    fingerprint: str
    """SHA-256 (hex) of size, first and last 64 KiB; of a stream, of what it begins with."""

    def check_unchanged(self) -> None:
        """Raise a DataError when the file is not of the size and age it was."""
        if is_stream(self.path):
            return
        with disk_errors("read", Path(self.path), DataError):
            now = status_of(self.path)
        if now != (self.bytes, self.mtime_ns):
            raise DataError(
                f"{self.path} changed while it was read ({self.bytes:,} bytes then, {now.size:,} now); start again "
                "when it is complete"
            )


def examine(found: Input) -> InputFile:
    """Look at an input.

    Raises:
        DataError: it cannot be read, is too large for one document, or its path cannot be written down.
    """
    try:
        found.path.encode()
    except UnicodeEncodeError:
        raise DataError(f"the path {found.path!r} is not valid UTF-8; rename the file or its folder") from None
    with disk_errors("read", Path(found.path), DataError), closing(open_input(found.path, peek=True)) as file:
        status = status_of(found.path)
        check_size(found.path, status.size)
        digest = hashlib.sha256(f"{status.size}\n".encode())
        digest.update(file.raw.read(_SAMPLE))
        if file.seekable:
            file.raw.seek(max(file.raw.tell(), status.size - _SAMPLE))
            digest.update(file.raw.read(_SAMPLE))
    return InputFile(found.path, found.source, status.size, status.mtime_ns, digest.hexdigest())
