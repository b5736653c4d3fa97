"""A preprocessing job at work: inputs -> tasks -> outputs, and what is noted of them on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from steel_megatron.data.preprocessing.encoder import TRAIN, Encoded, Encoder, Position, Task
from steel_megatron.data.preprocessing.journal import InputFile, Journal, SkippedRows
from steel_megatron.data.preprocessing.shards import ShardedWriter
from steel_megatron.data.preprocessing.stored_documents import count_ids
from steel_megatron.data.preprocessing.workers import encoded
from steel_megatron.data.reading.formats import FileOffset, RawChunk, read_chunks
from steel_megatron.data.reading.sources import Source
from steel_megatron.errors import DataError
from steel_megatron.log import progress
from steel_megatron.signals import StopSignals


@dataclass(frozen=True)
class ChunkSizes:
    """How large the steps of a job are; has no influence on what it writes."""

    chunk_bytes: int = 4 << 20
    """Raw bytes that are encoded in one go."""
    journal_bytes: int = 256 << 20
    """Bytes of text after which the journal is written."""
    journal_seconds: float = 30.0
    """Time after which it is; whichever comes first."""


class Run:
    """The outputs of a job, always in step with the position in its inputs that the journal notes.

    Args:
        job: what decides the bytes of the outputs, as JSON: ``settings``, which the manifests repeat, ``inputs``,
            ``shard_size``.
        outputs: path of each corpus without shard number and suffix, by split and key.
        dtype: how ids are stored.
        journal: that of the job.
        overwrite: whether corpora that are there may be replaced.
        noted: what the journal has of this job; None to begin.

    Raises:
        DataError: an output cannot be written, or is not what was noted of it.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        outputs: Mapping[tuple[str, str], str],
        dtype: np.dtype[Any],
        journal: Journal,
        overwrite: bool,
        noted: Mapping[str, Any] | None,
    ) -> None:
        self.job, self.overwrite, self.journal = job, overwrite, journal
        self.outputs: dict[tuple[str, str], ShardedWriter] = {}
        self.skipped_rows: dict[str, int] = {}
        """Rows that gave no document, by source."""
        self.position = Position()
        """Where the next task begins."""
        self.token_counts = np.zeros(job["settings"]["tokenizer"]["vocab_size"], dtype=np.int64)
        """How often each token was written to the training split [vocabulary]."""
        if noted is not None:
            number, row, offset = noted["position"]
            self.position = Position(number, FileOffset(row, offset))
            self.skipped_rows = dict(noted["skipped_rows"])
            self.token_counts += noted["token_counts"]
        self._noted = self.position
        self._in_step, self._left = True, False
        # Manifests are the same wherever and whenever a file was copied; its age only tells this job of a change.
        inputs = [{name: value for name, value in entry.items() if name != "mtime_ns"} for entry in job["inputs"]]
        with ExitStack() as opened:
            self._skipped = SkippedRows(journal.prefix, 0 if noted is None else noted["skipped_bytes"])
            opened.callback(self._skipped.close, keep=noted is not None)
            for (split, key), prefix in outputs.items():
                about = {**job["settings"], "split": split, "key": key}
                state = None if noted is None else noted["outputs"][f"{split}.{key}"]
                writer = ShardedWriter(prefix, dtype, inputs, about, job["shard_size"], overwrite, state)
                opened.callback(writer.discard if noted is None else writer.suspend)
                self.outputs[split, key] = writer
            if noted is None:
                self.note()  # from here on a killed job leaves nothing that the same command would stumble over
            opened.pop_all()

    @property
    def skipped(self) -> int:
        """Rows that gave no document."""
        return sum(self.skipped_rows.values())

    def write(self, result: Encoded, end: Position) -> bool:
        """Write what a task gave; returns whether a shard became full, which is the time to :meth:`note`."""
        self._in_step = False
        full = [self.outputs[name].add(documents) for name, documents in result.documents.items()]
        for (split, _), documents in result.documents.items():
            if split == TRAIN:
                count_ids(self.token_counts, documents.ids)
        self._skipped.add(result.skipped)
        for entry in result.skipped:
            source = self.job["inputs"][entry.input]["source"]
            self.skipped_rows[source] = self.skipped_rows.get(source, 0) + 1
        self.position = end
        self._in_step = True
        return any(full)

    def note(self) -> None:
        """Put everything on disk and note how far it is.

        Raises:
            DataError: the disk is full, or a write was cut short; then an earlier note is what there is.
        """
        if not self._in_step:
            raise DataError(f"a write to the outputs of {self.journal.prefix} was cut short")
        self.journal.write(
            {
                "job": self.job,
                "overwrite": self.overwrite,
                "position": [self.position.input, self.position.place.row, self.position.place.offset],
                "outputs": {f"{split}.{key}": writer.state() for (split, key), writer in self.outputs.items()},
                "skipped_bytes": self._skipped.length(),
                "skipped_rows": self.skipped_rows,
                "token_counts": self.token_counts,
            }
        )
        self._noted = self.position

    def complete(self) -> None:
        """Give everything its final name; what goes on from here, after a kill, comes to the same end.

        Raises:
            DataError: an output got no document, which leaves nothing; or the disk is full.
        """
        try:
            self._check_not_empty()
        except DataError:
            self._noted = Position()  # to go on would come to the same
            self.leave()
            raise
        self.note()
        for writer in self.outputs.values():
            writer.prepare()
        for writer in self.outputs.values():
            writer.commit()
        self._skipped.commit()

    def forget(self) -> None:
        """Remove the journal of a job that is complete and reported: the last step."""
        self.journal.remove()
        self._left = True

    def _check_not_empty(self) -> None:
        for (split, key), writer in self.outputs.items():
            documents = sum(other.documents for (_, of_key), other in self.outputs.items() if of_key == key)
            if documents == 0:
                raise DataError(f"the inputs hold no document under key {key!r} ({self.skipped:,} rows were skipped)")
            if writer.documents == 0:
                fraction = self.job["settings"]["valid_fraction"]
                raise DataError(
                    f"the {split} split got none of {documents:,} documents with valid_fraction = {fraction}; choose "
                    "a fraction nearer to one half, or another seed, or 0 for no split"
                )
            if writer.tokens == 0:
                raise DataError(
                    f"the tokenizer makes no token of any of the {writer.documents:,} documents under key {key!r} in "
                    f"the {split} split; a corpus needs tokens: end documents in a token of their own with append_eod"
                )

    def leave(self) -> bool:
        """Leave an unfinished job: to go on later, or, if nothing is noted yet, without a trace.

        Returns:
            whether something was kept.
        """
        if self._left:
            return False
        self._left = True
        keep = self._noted != Position()
        for writer in self.outputs.values():
            if keep:
                writer.suspend()
            else:
                writer.discard()
        self._skipped.close(keep)
        if not keep:
            with suppress(DataError):
                self.journal.remove()
        return keep


def write_all(
    run: Run,
    encoder: Encoder,
    files: Sequence[InputFile],
    workers: int,
    pace: ChunkSizes,
    signals: StopSignals,
) -> None:
    """Write all documents of the inputs from the run's position on.

    Args:
        run: the outputs, and the position.
        encoder: how documents become ids.
        files: all inputs, from the first on.
        workers: workers that encode; 1 to encode in the calling process.
        pace: bytes of a task, and how often the journal is written.
        signals: held back while a result is written.

    Raises:
        DataError: an input cannot be read, a row stops the job, a worker died, or the disk is full.
    """
    tell: list[Callable[[int], None]] = []
    tasks = _tasks(files, encoder.sources, run.position, pace.chunk_bytes, lambda count: tell[0](count))
    total = sum(file.bytes for file in files[run.position.input :])
    with progress("preprocess", total, "bytes") as bar, closing(encoded(tasks, encoder, workers)) as results:
        tell.append(bar.advance)
        noted_at, unnoted = time.monotonic(), 0
        try:
            for end, result in results:
                with signals.held():
                    full = run.write(result, end)
                    unnoted += sum(int(part.text_bytes.sum()) for part in result.documents.values())
                    if full or unnoted >= pace.journal_bytes or time.monotonic() - noted_at >= pace.journal_seconds:
                        run.note()
                        noted_at, unnoted = time.monotonic(), 0
        except BaseException:
            with suppress(DataError), signals.held():  # first of all: a scheduler does not wait long
                run.note()
            raise


def _tasks(
    files: Sequence[InputFile],
    sources: Mapping[str, Mapping[str, Source]],
    start: Position,
    chunk_bytes: int,
    on_bytes: Callable[[int], None],
) -> Iterator[Task]:
    """The inputs from a position on; chunks of small files come together, up to ``chunk_bytes``."""
    pieces: list[tuple[int, str, RawChunk]] = []
    size, end = 0, start

    def taken() -> Task:  # handed out from here, as a frame that waits would keep it in memory
        nonlocal pieces, size
        task, pieces, size = Task(tuple(pieces), end), [], 0
        return task

    for number in range(start.input, len(files)):
        file = files[number]
        columns = _columns([by_name[file.source] for by_name in sources.values()])
        place = start.place if number == start.input else FileOffset()
        for chunk in read_chunks(file.path, place, chunk_bytes, columns, on_bytes):
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


def _columns(sources: Sequence[Source]) -> list[str] | None:
    """The columns that are needed of a parquet file; None for all."""
    columns: list[str] = []
    for source in sources:
        if source.columns is None:
            return None
        columns += source.columns
    return columns
