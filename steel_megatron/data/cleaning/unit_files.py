"""The files that one unit of work writes: under temporary names, and under their own when all are complete."""

from __future__ import annotations

import io
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import zstandard

from steel_megatron.data.reading.formats import parse_chunk, read_chunks
from steel_megatron.errors import DataError
from steel_megatron.files import sync_folder, write_atomically


class UnitFiles:
    """The compressed JSON lines that one unit writes; they get their names all together, by :meth:`commit`.

    Args:
        folder: the job's folder.
        name: the unit's name; files are called ``<given folder>/<name>.jsonl.zst``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._temporary = folder / "tmp" / f"{socket.gethostname()}-{os.getpid()}-{name}"
        self._open: dict[str, tuple[BinaryIO, Any]] = {}

    def write(self, folder: str, row: dict[str, Any]) -> None:
        """Append a row to the unit's file in a sub-folder of the job's."""
        if folder not in self._open:
            path = self._temporary / folder / f"{self._name}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.open("wb")
            self._open[folder] = raw, zstandard.ZstdCompressor(write_checksum=True).stream_writer(raw, closefd=False)
        self._open[folder][1].write(orjson.dumps(row) + b"\n")

    def commit(self) -> dict[str, int]:
        """Finish the files, sync them to disk and give them their names.

        Returns:
            the bytes of each, by its path in the job's folder.
        """
        sizes = {}
        for folder, (raw, stream) in self._open.items():
            stream.close()
            raw.flush()
            os.fsync(raw.fileno())
            sizes[f"{folder}/{self._name}.jsonl.zst"] = raw.tell()
            raw.close()
            final = self._folder / folder
            final.mkdir(parents=True, exist_ok=True)
            os.replace(self._temporary / folder / f"{self._name}.jsonl.zst", final / f"{self._name}.jsonl.zst")
            sync_folder(final)
        self._open.clear()
        return sizes

    def __enter__(self) -> UnitFiles:
        shutil.rmtree(self._temporary, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        for raw, _stream in self._open.values():
            with suppress(OSError):
                raw.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def storable(path: str | Path) -> str:
    r"""A path as UTF-8 can hold it: bytes of a file name that are none, of an archive in GBK say, become ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that :class:`UnitFiles` wrote.

    Raises:
        DataError: it is damaged.
    """
    for chunk in read_chunks(path):
        for _, _, _, value in parse_chunk(chunk):
            assert isinstance(value, dict), f"{path}: {value}"
            yield value


def damaged(path: Path, folder: Path, why: object) -> DataError:
    """The error for a file of a unit that is done, which is lost or damaged.

    Args:
        path: the file.
        folder: the job's folder.
        why: what is wrong.
    """
    return DataError(f"{path}, which an earlier step wrote, is lost or damaged ({why}); remove {folder} to start anew")


def load_array(path: Path, folder: Path) -> np.ndarray:
    """Read what :func:`save_array` wrote into a job's folder.

    Raises:
        DataError: it is lost or damaged.
    """
    try:
        found: np.ndarray = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, folder, error) from error
    return found


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file that is there complete or not at all."""
    content = io.BytesIO()
    np.save(content, values)
    write_atomically(path, content.getvalue(), DataError)
