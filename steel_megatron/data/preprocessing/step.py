"""The step of a preprocessing job that costs time: input files -> segments of encoded documents."""

from __future__ import annotations

import itertools
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.data.preprocessing.encoder import Documents, Encoder, Position, Task
from steel_megatron.data.preprocessing.inputs import InputFile
from steel_megatron.data.preprocessing.segments import STEP, Corpus, Segment, SegmentWriter, segments_of
from steel_megatron.data.preprocessing.workers import encoded
from steel_megatron.data.reading.chunks import FileOffset, RawChunk
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.sources import Source
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors
from steel_megatron.jobs import step as in_process
from steel_megatron.jobs.folder import read_json
from steel_megatron.jobs.step import JobStep, marker
from steel_megatron.signals import StopSignals, stop_signals

_SEGMENTS = "segments"
"""In the marker of a unit that is done: how many segments it has."""
UNIT_BYTES = 32 << 20
"""Files that follow each other are done together up to so many bytes, as stored; a larger file is a unit of its own."""


@dataclass(frozen=True)
class ChunkSizes:
    """How large the steps of a job are; has no influence on what it writes."""

    chunk_bytes: int = 4 << 20
    """Raw bytes that are encoded in one go."""
    segment_bytes: int = 256 << 20
    """Bytes of text after which a segment is closed: what a kill costs at most."""
    segment_seconds: float = 30.0
    """Time after which it is; whichever comes first."""


def units_of(files: Sequence[InputFile]) -> tuple[tuple[int, int], ...]:
    """The units of a job: number of the first input of each, and that of the first one behind it."""
    units: list[tuple[int, int]] = []
    size = 0
    for number, file in enumerate(files):
        expected = UNIT_BYTES if file.mtime_ns == file.bytes == 0 else file.bytes  # of a stream, nobody knows
        if units and size + expected <= UNIT_BYTES:
            units[-1] = (units[-1][0], number + 1)
            size += expected
        else:
            units.append((number, number + 1))
            size = expected
    return tuple(units)


@dataclass(frozen=True)
class EncodeUnits(JobStep):
    """Encodes the documents of units; see :mod:`steel_megatron.data.preprocessing.segments` for what it writes."""

    job_folder: Path
    files: tuple[InputFile, ...]
    units: tuple[tuple[int, int], ...]
    encoder: Encoder
    corpora: tuple[Corpus, ...]
    """Split and key of each corpus."""
    pace: ChunkSizes
    job_name = "preprocess"
    name = STEP

    @property
    def folder(self) -> Path:
        return self.job_folder

    @property
    def count(self) -> int:
        return len(self.units)

    def bytes_to_read(self) -> int:
        return sum(self.files[number].bytes for unit in self.missing() for number in range(*self.units[unit]))

    def work(self, number: int) -> None:
        self.work_on([number])

    def work_on(self, numbers: Sequence[int]) -> None:
        with stop_signals() as signals:
            with signals.held():  # a library swallows an exception while it imports others, at its first call
                self.encoder.tokenizer.encode_flat(["."])
            self.encode(numbers, 1, signals)

    def begun(self) -> list[list[Segment]]:
        """The segments of each unit so far; a unit of which some were lost is no longer done."""
        done = set(range(self.count)).difference(self.missing())  # first: tasks of an earlier call may be at work
        found = [segments_of(self.folder, unit) for unit in range(self.count)]
        for unit in done:
            self._has_all(unit, found[unit])
        return found

    def segments(self, unit: int) -> list[Segment]:
        """The segments of a unit that is done.

        Raises:
            DataError: some were lost; the unit is then to be done again.
        """
        found = segments_of(self.folder, unit)
        if not self._has_all(unit, found):
            raise DataError(
                f"{self.folder / 'segments' / f'{unit:06d}'} has lost files; what they held is made again when the "
                "same command is run again"
            )
        return found

    def _has_all(self, unit: int, found: Sequence[Segment]) -> bool:
        """Whether these are as many segments as the unit had when it was done; if not, it is to be done again."""
        done = marker(self.folder, STEP, unit)
        if (read_json(done) or {}).get(_SEGMENTS) == len(found):
            return True
        with disk_errors("remove", done, DataError):
            done.unlink(missing_ok=True)
        return False

    def encode(
        self,
        numbers: Sequence[int],
        workers: int,
        signals: StopSignals,
        on_result: Callable[[Mapping[Corpus, Documents]], None] = lambda documents: None,
    ) -> None:
        """Do units, each from behind its last segment on; what was done before an error or a signal is kept.

        Args:
            numbers: the units, in order.
            workers: workers that encode; 1 to encode in the calling process.
            signals: held back while a result is written.
            on_result: called with the documents of each result, in the order of the inputs.

        Raises:
            DataError: an input cannot be read, a row stops the job, a worker died, or the disk is full.
        """
        before = {number: segments_of(self.folder, number) for number in numbers}
        tasks = itertools.chain.from_iterable(self._tasks(number, before[number]) for number in numbers)
        recorder = _Recorder(self, {number: len(segments) for number, segments in before.items()})
        with closing(encoded(tasks, self.encoder, workers)) as results:
            try:
                for end, result in results:
                    with signals.held():
                        recorder.segment_for(self._unit(end.input)).add(result, end)
                        on_result(result.documents)
                        recorder.close_if_due()
                with signals.held():
                    recorder.finish()
            except BaseException:
                with suppress(DataError), signals.held():  # first of all: a scheduler does not wait long
                    recorder.close()
                raise

    def _unit(self, number: int) -> int:
        """The unit of an input."""
        return bisect_right(self.units, (number, len(self.files) + 1)) - 1

    def _tasks(self, unit: int, segments: Sequence[Segment]) -> Iterator[Task]:
        """What is left of a unit; chunks of small files come together, up to ``chunk_bytes``."""
        pieces: list[tuple[int, str, RawChunk]] = []
        chunk_bytes = self.pace.chunk_bytes
        first, last = self.units[unit]
        end = segments[-1].end if segments else Position(first)
        first, offset, size = end.input, end.place, 0

        def taken() -> Task:  # handed out from here, as a frame that waits would keep it in memory
            nonlocal pieces, size
            task, pieces, size = Task(tuple(pieces), end), [], 0
            return task

        for number in range(first, last):
            file = self.files[number]
            columns = _columns([by_name[file.source] for by_name in self.encoder.sources.values()])
            start = offset if number == first else FileOffset()
            for chunk in read_chunks(file.path, start, chunk_bytes, columns, lambda size: in_process.on_bytes(size)):
                if pieces and size + len(chunk.payload) > chunk_bytes:
                    yield taken()
                pieces.append((number, file.source, chunk))
                size, end = size + len(chunk.payload), Position(number, chunk.end)
                del chunk  # it may be large, and this frame waits
                if size >= chunk_bytes // 2:
                    yield taken()
            file.check_unchanged()
        if pieces:
            yield taken()


class _Recorder:
    """The segment that is being written, and which units are done.

    Args:
        step: the step.
        segments: by the number of each unit to do, in order, the segments that it has already.
    """

    def __init__(self, step: EncodeUnits, segments: Mapping[int, int]) -> None:
        self._step, self._left = step, dict(segments)
        self._sources = [file.source for file in step.files]
        self._segment: SegmentWriter | None = None
        self._begun_at = time.monotonic()

    def segment_for(self, unit: int) -> SegmentWriter:
        """The segment for the next result of a unit; the units before it are done."""
        self.finish(unit)
        if self._segment is None:
            step = self._step
            self._segment = SegmentWriter(step.folder, unit, self._left[unit], step.corpora, self._sources)
            self._left[unit] += 1
        return self._segment

    def close_if_due(self) -> None:
        """Close the segment when it is large or old enough."""
        assert self._segment is not None
        old = time.monotonic() - self._begun_at >= self._step.pace.segment_seconds
        if old or self._segment.text_bytes >= self._step.pace.segment_bytes:
            self.close()

    def close(self) -> None:
        """Close the segment, if there is one."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
        self._begun_at = time.monotonic()

    def finish(self, unit: int | None = None) -> None:
        """Mark the units before this one, or all, as done."""
        while self._left and (done := next(iter(self._left))) != unit:
            self.close()
            self._step.mark(done, json.dumps({_SEGMENTS: self._left[done]}).encode())
            del self._left[done]


def _columns(sources: Sequence[Source]) -> list[str] | None:
    """The columns that are needed of a parquet file; None for all."""
    columns: list[str] = []
    for source in sources:
        if source.columns is None:
            return None
        columns += source.columns
    return columns
