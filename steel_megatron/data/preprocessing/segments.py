"""What a unit of input gave, on disk: segments that follow each other, each closed for good.

A segment holds what some consecutive chunks of the unit gave: for each corpus the ids and a row for each document, and
the rows that gave none. Its marker is written last; it says where the next segment begins, so a job that was killed
resumes behind the last marker. Where a segment ends has no influence on the corpora that segments are put together to.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from steel_megatron.data.preprocessing.encoder import Documents, Encoded, Position
from steel_megatron.data.reading.chunks import FileOffset
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, remove, sync_folder, write_atomically
from steel_megatron.jobs.step import marker
from steel_megatron.log import get_logger

_DOCUMENT = np.dtype([("tokens", "<i8"), ("row", "<i8"), ("input", "<i8"), ("text_bytes", "<i8")])
"""What is kept of each document in addition to its ids."""
_READ_TOKENS = 1 << 20
"""Tokens that are put together at a time."""
_READ_BYTES = 1 << 20
"""Bytes that are hashed at a time."""
_SKIPPED = "skipped"

STEP = "encode"
"""Name of the step that writes segments."""

Corpus = tuple[str, str]
"""Split and key."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class Segment:
    """A closed segment, as its marker has it."""

    folder: Path
    """The job's folder."""
    unit: int
    number: int
    """Of the segment in its unit, from 0."""
    end: Position
    """Where the next one begins."""
    skipped_rows: Mapping[str, int]
    """Rows that gave no document, by source."""
    files: Mapping[str, tuple[int, str]]
    """Bytes and xxh3_64 (hex) of each file, by the end of its name."""

    def documents(self, corpora: Sequence[Corpus], dtype: np.dtype[Any]) -> Iterator[dict[Corpus, Documents]]:
        """What the segment has of each corpus, in pieces.

        Args:
            corpora: the job's corpora, in its order.
            dtype: how ids are stored.

        Raises:
            DataError: a file is damaged; the unit is then to be done again.
        """
        for number, corpus in enumerate(corpora):
            if f"{number}.ids" not in self.files:
                continue
            rows = np.fromfile(self._verified(f"{number}.docs"), dtype=_DOCUMENT)
            ends = np.cumsum(rows["tokens"])
            path, start = self._verified(f"{number}.ids"), 0
            with disk_errors("read", path, DataError), path.open("rb") as ids:
                while start < len(rows):
                    begin = int(ends[start - 1]) if start else 0
                    stop = max(int(np.searchsorted(ends, begin + _READ_TOKENS, side="right")), start + 1)
                    content = ids.read((int(ends[stop - 1]) - begin) * dtype.itemsize)
                    columns = (rows[name][start:stop].copy() for name in ("tokens", "row", "input", "text_bytes"))
                    yield {corpus: Documents(np.frombuffer(content, dtype), *columns)}
                    start = stop

    def skipped(self) -> bytes:
        """JSON lines of the rows that gave no document.

        Raises:
            DataError: the file is damaged.
        """
        return self._verified(_SKIPPED).read_bytes() if _SKIPPED in self.files else b""

    def _verified(self, ending: str) -> Path:
        """A file of the segment, which is what was written; otherwise the unit is to be done again."""
        path, (size, digest) = self.marker.with_suffix(f".{ending}"), self.files[ending]
        hasher = xxhash.xxh3_64()
        with disk_errors("read", path, DataError), suppress(FileNotFoundError), path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                hasher.update(piece)
        if hasher.hexdigest() != digest:
            for done in (marker(self.folder, STEP, self.unit), self.marker):
                done.unlink(missing_ok=True)
            raise DataError(
                f"{path} is not what was written ({size:,} bytes, xxh3 {digest}); what it held is made again when the "
                "same command is run again"
            )
        return path

    @property
    def marker(self) -> Path:
        """The file that says that the segment is complete."""
        return _marker(self.folder, self.unit, self.number)


def segments_of(folder: Path, unit: int) -> list[Segment]:
    """The closed segments of a unit, in order, up to the first one that is missing or whose marker is damaged.

    Raises:
        DataError: a marker cannot be read.
    """
    found: list[Segment] = []
    while (path := _marker(folder, unit, len(found))).exists():
        with disk_errors("read", path, DataError):
            content = path.read_bytes()
        try:
            recorded = json.loads(content)
            number, row, offset = recorded["end"]
            end = Position(number, FileOffset(row, offset))
            files = {name: (int(size), str(digest)) for name, (size, digest) in recorded["files"].items()}
            found.append(Segment(folder, unit, len(found), end, dict(recorded["skipped_rows"]), files))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning(f"{path} is damaged ({error!r}); its segment, and those behind it, are made again")
            break
    return found


def _marker(folder: Path, unit: int, number: int) -> Path:
    return folder / "segments" / f"{unit:06d}" / f"{number:06d}.json"


class SegmentWriter:
    """Writes a segment: under temporary names, until it is closed.

    Args:
        folder: the job's folder.
        unit: number of the unit.
        number: of the segment in its unit, from 0.
        corpora: the job's corpora, in its order.
        sources: name of the source of each input.

    Raises:
        DataError: the disk refuses.
    """

    def __init__(self, folder: Path, unit: int, number: int, corpora: Sequence[Corpus], sources: Sequence[str]) -> None:
        self._marker = _marker(folder, unit, number)
        self._temporary = folder / "tmp" / f"{socket.gethostname()}-{os.getpid()}-{unit:06d}-{number:06d}"
        self._numbers = {corpus: place for place, corpus in enumerate(corpora)}
        self._sources = sources
        self._files: dict[str, tuple[IO[bytes], xxhash.xxh3_64]] = {}
        self._skipped_rows: dict[str, int] = {}
        self._end: Position | None = None
        self.text_bytes = 0
        """Bytes of the texts so far."""
        with disk_errors("remove", self._marker, DataError):
            for later in self._marker.parent.glob("*.json"):  # they came after one that is to be made again
                if later.stem >= self._marker.stem:
                    later.unlink()

    def add(self, result: Encoded, end: Position) -> None:
        """Append what a task gave.

        Args:
            result: documents and skipped rows.
            end: where the next task begins.

        Raises:
            DataError: the disk is full; the segment is lost.
        """
        self._end = None  # a write that is cut short leaves nothing to close
        with disk_errors("write", self._marker, DataError):
            self._temporary.mkdir(parents=True, exist_ok=True)
            for corpus, documents in result.documents.items():
                rows = np.empty(len(documents.lengths), dtype=_DOCUMENT)
                rows["tokens"], rows["row"] = documents.lengths, documents.rows
                rows["input"], rows["text_bytes"] = documents.inputs, documents.text_bytes
                self._write(f"{self._numbers[corpus]}.ids", np.ascontiguousarray(documents.ids).view(np.uint8).data)
                self._write(f"{self._numbers[corpus]}.docs", rows.view(np.uint8).data)
                self.text_bytes += int(documents.text_bytes.sum())
            for entry in result.skipped:
                line = json.dumps({**asdict(entry.row), "key": entry.key}, ensure_ascii=False)
                self._write(_SKIPPED, line.encode() + b"\n")
                source = self._sources[entry.input]
                self._skipped_rows[source] = self._skipped_rows.get(source, 0) + 1
        self._end = end

    def _write(self, ending: str, content: bytes | memoryview) -> None:
        if ending not in self._files:
            self._files[ending] = (self._temporary / ending).open("wb"), xxhash.xxh3_64()
        file, hasher = self._files[ending]
        file.write(content)
        hasher.update(content)

    def close(self) -> None:
        """Put everything on disk and write the marker.

        Raises:
            DataError: the disk is full, or a write before was cut short; the segment is lost.
        """
        try:
            if self._end is None:
                raise DataError(f"a write to {self._marker} was cut short")
            files = {}
            folder = self._marker.parent
            with disk_errors("write", self._marker, DataError):
                folder.mkdir(parents=True, exist_ok=True)
                for ending, (file, hasher) in self._files.items():
                    file.flush()
                    os.fsync(file.fileno())
                    files[ending] = (file.tell(), hasher.hexdigest())
                    os.replace(self._temporary / ending, self._marker.with_suffix(f".{ending}"))
                for parent in (folder, folder.parent, folder.parent.parent):  # which may have been made just now
                    sync_folder(parent)
            end = [self._end.input, self._end.place.row, self._end.place.offset]
            content = {"end": end, "skipped_rows": self._skipped_rows, "files": files}
            write_atomically(self._marker, json.dumps(content).encode(), DataError)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what is left under temporary names."""
        for ending, (file, _) in self._files.items():
            with suppress(OSError):
                file.close()
            remove(self._temporary / ending)
        with suppress(OSError):
            self._temporary.rmdir()
