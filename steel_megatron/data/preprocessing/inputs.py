"""The input files of a preprocessing job, and how a change is detected."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.data.reading.documents import Input
from steel_megatron.data.reading.formats import check_size
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
