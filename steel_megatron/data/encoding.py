"""Chunks of raw rows -> token ids: the part of preprocessing that worker processes do.

The calling process cuts files into chunks and writes what comes back, in order; everything that costs time is here.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.formats import Place, RawChunk
from steel_megatron.data.long_texts import pieces
from steel_megatron.data.named_sources import Source
from steel_megatron.data.sources import BadRowPolicy, SkippedRow, documents_of
from steel_megatron.data.tokenizer import Tokenizer, encode_dialogues
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors

TRAIN, VALID = "train", "valid"
"""Names of the splits."""

_BYTES_PER_WORKER = 4 << 20
"""Raw bytes that are on the way for each worker; more would only take memory."""
_SIGNAL_SECONDS = 0.3
"""A scheduler that ends a job sends SIGTERM to the workers too: time for our own, which says more than their end."""
_LOOK_SECONDS = 5.0
"""After so much time without a result, look whether all workers are alive."""
_BEGIN = Place()


@dataclass(frozen=True)
class Position:
    """How far a job has come: everything before it is done."""

    input: int = 0
    """Number of the input file, from 0."""
    place: Place = _BEGIN
    """Place in that file."""


@dataclass(frozen=True)
class Task:
    """Chunks that are encoded in one go; those of small files come together."""

    pieces: tuple[tuple[int, str, RawChunk], ...]
    """Number of the input file, name of its source, chunk."""
    end: Position
    """Where the next task begins."""

    @property
    def bytes(self) -> int:
        """Bytes of the chunks."""
        return sum(len(chunk.payload) for _, _, chunk in self.pieces)


@dataclass(frozen=True)
class Documents:
    """Documents of one corpus, one after the other."""

    ids: np.ndarray
    """Their ids, as they are stored [tokens]."""
    lengths: np.ndarray
    """Tokens of each, int64 [documents]."""
    rows: np.ndarray
    """Row of each in its file, from 1, int64 [documents]."""
    inputs: np.ndarray
    """Number of its input file, from 0, int64 [documents]."""
    text_bytes: np.ndarray
    """Bytes of its text in UTF-8, int64 [documents]."""

    def part(self, start: int, stop: int) -> Documents:
        """Some of the documents."""
        first, last = int(self.lengths[:start].sum()), int(self.lengths[:stop].sum())
        others = (values[start:stop] for values in (self.lengths, self.rows, self.inputs, self.text_bytes))
        return Documents(self.ids[first:last], *others)

    def chosen(self, which: np.ndarray) -> Documents:
        """Those documents for which ``which``, bool [documents], holds."""
        others = (values[which] for values in (self.lengths, self.rows, self.inputs, self.text_bytes))
        return Documents(self.ids[np.repeat(which, self.lengths)], *others)


@dataclass(frozen=True)
class Skipped:
    """A row that gave no document."""

    input: int
    """Number of its input file, from 0."""
    key: str
    """The key under which a text was looked for."""
    row: SkippedRow


@dataclass(frozen=True)
class Encoded:
    """What a task gave."""

    documents: dict[tuple[str, str], Documents]
    """By split and key; a corpus that got none may be missing."""
    skipped: list[Skipped]


@dataclass(frozen=True)
class Encoder:
    """How documents become ids."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    """How ids are stored."""
    sources: Mapping[str, Mapping[str, Source]]
    """By the key that names a corpus: the sources by name. Sent to workers, as they need not know its name."""
    on_bad_row: BadRowPolicy = "stop"
    append_eod: bool = True
    valid_fraction: float = 0.0
    seed: int = 0
    """Of the choice of the validation split."""
    long: int = 1 << 20
    """Characters above which a text is encoded in pieces: a tokenizer's library takes 100 times a text in memory."""

    def encode(self, task: Task) -> Encoded:
        """Parse and encode.

        Raises:
            DataError: a bad row, where those stop the job.
        """
        found = {key: _Texts() for key in self.sources}
        skipped: list[Skipped] = []
        for number, source, chunk in task.pieces:
            for key, texts in found.items():
                rows = _SkippedTo(skipped, number, key)
                for document in documents_of(chunk, self.sources[key][source], self.on_bad_row, rows):
                    texts.contents.append(document.text)
                    texts.rows.append(document.row)
                    texts.inputs.append(number)
                    texts.dialogue.append(document.dialogue)
        documents: dict[tuple[str, str], Documents] = {}
        for key, texts in found.items():
            if texts.contents:
                documents.update(self._split(key, texts))
        return Encoded(documents, skipped)

    def _split(self, key: str, texts: _Texts) -> Iterator[tuple[tuple[str, str], Documents]]:
        ids, lengths = self._ids(texts)
        text_bytes, valid = np.empty(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=bool)
        keyed = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        for at, text in enumerate(texts.contents):
            content = text.encode()
            text_bytes[at] = len(content)
            if self.valid_fraction:  # by the text alone, so that a document never changes sides
                digest = keyed.copy()
                digest.update(content)
                valid[at] = int.from_bytes(digest.digest(), "big") < self.valid_fraction * 2**64
        everything = Documents(ids, lengths, np.array(texts.rows), np.array(texts.inputs), text_bytes)
        if not valid.any():
            yield (TRAIN, key), everything
            return
        yield (VALID, key), everything.chosen(valid)
        if not valid.all():
            yield (TRAIN, key), everything.chosen(~valid)

    def _ids(self, texts: _Texts) -> tuple[np.ndarray, np.ndarray]:
        """Ids as they are stored, each document with one end, and the documents' lengths."""
        if all(texts.dialogue):
            ids, lengths = self._encode(texts.contents, self._encode_dialogues)
        elif not any(texts.dialogue):
            ids, lengths = self._encode(texts.contents, self.tokenizer.encode_flat)
        else:
            ids, lengths = self._mixed(texts)
        ids = ids.astype(self.dtype, copy=False)  # ids are below vocab_size, which the dtype holds
        if not self.append_eod:
            return ids, lengths
        ends = np.cumsum(lengths)
        missing = lengths == 0
        full = ~missing
        missing[full] = ids[ends[full] - 1] != self.tokenizer.eod_id  # a dialogue may end in it already
        return np.insert(ids, ends[missing], self.tokenizer.eod_id), lengths + missing

    def _mixed(self, texts: _Texts) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of dialogues among other documents."""
        dialogue = np.array(texts.dialogue)
        others = [texts.contents[at] for at in np.flatnonzero(~dialogue)]
        dialogues = [texts.contents[at] for at in np.flatnonzero(dialogue)]
        ids, lengths = self._encode(others, self.tokenizer.encode_flat)
        turns, of_turns = self._encode(dialogues, self._encode_dialogues)
        all_lengths = np.empty(len(dialogue), dtype=np.int64)
        all_lengths[dialogue], all_lengths[~dialogue] = of_turns, lengths
        of_dialogue = np.repeat(dialogue, all_lengths)
        all_ids = np.empty(len(of_dialogue), dtype=np.int32)
        all_ids[of_dialogue], all_ids[~of_dialogue] = turns, ids
        return all_ids, all_lengths

    def _encode_dialogues(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_dialogues(self.tokenizer, texts)

    def _encode(
        self, texts: Sequence[str], encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of texts; very long ones are encoded in pieces, and not all at once."""
        if sum(map(len, texts)) <= self.long:
            return encode(texts)
        cut = [pieces(text, self.tokenizer.encode) if len(text) > self.long else [text] for text in texts]
        results = [encode(group) for group in _groups(itertools.chain.from_iterable(cut), self.long)]
        lengths = np.concatenate([of_group for _, of_group in results])
        ids = np.concatenate([found.astype(self.dtype, copy=False) for found, _ in results])
        return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, cut[:-1])]))


def _groups(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts together, as long as they have no more characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


class _Texts:
    """The documents of one key, in columns."""

    def __init__(self) -> None:
        self.contents: list[str] = []
        self.rows: list[int] = []
        self.inputs: list[int] = []
        self.dialogue: list[bool] = []


@dataclass(frozen=True)
class _SkippedTo:
    """Appends skipped rows to a list."""

    rows: list[Skipped]
    number: int
    key: str

    def __call__(self, row: SkippedRow) -> None:
        self.rows.append(Skipped(self.number, self.key, row))


def encoded(tasks: Iterator[Task], encoder: Encoder, workers: int) -> Generator[tuple[Position, Encoded]]:
    """Encode tasks here or in worker processes; what comes back is in the order of the tasks.

    Closed early, or ended by an error or a signal, it does not wait for what the workers are at.

    Yields:
        The end of each task and what it gave.

    Raises:
        DataError: of a task, or of the iterator of tasks: after everything that was before it in the inputs. Or a
            worker process died.
    """
    if workers == 1:
        for task in tasks:
            yield task.end, encoder.encode(task)
        return
    # Spawned, not forked: the calling process may have threads (of a tokenizer, of torch) that a fork would cut off.
    handed: Any = _Handed(encoder)  # which arrives as the encoder
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(handed,)
    )
    try:
        yield from _in_order(pool, tasks, workers * _BYTES_PER_WORKER)
    except BrokenProcessPool as error:
        _kill_workers(pool)  # the pool asks them to end by SIGTERM and waits; none is to make it wait for ever
        time.sleep(_SIGNAL_SECONDS)
        raise DataError(
            f"one of {workers} worker processes died (killed, perhaps for want of memory); run with fewer workers if "
            "memory is short"
        ) from error
    except BaseException:
        _kill_workers(pool)  # nobody takes their results any more, and a scheduler does not wait for a long row
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Handed:
    """An object for worker processes, on its way in a file without a name.

    What a process is started with goes through a pipe. One that dies before it has read that (killed, or its main
    script fails) would leave its parent waiting for ever, if it is more than a pipe holds.
    """

    def __init__(self, content: object) -> None:
        with disk_errors("write to", Path(tempfile.gettempdir()), DataError):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
            pickle.dump(content, self._file)
            self._file.flush()

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _taken, (multiprocessing.reduction.DupFd(self._file.fileno()),)


def _taken(descriptor: Any) -> Any:
    """What was handed to this worker."""
    with (
        open(descriptor.detach(), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,  # the file's position is shared with others
    ):
        return pickle.loads(content)


def _kill_workers(pool: ProcessPoolExecutor) -> None:
    for worker in list((pool._processes or {}).values()):
        worker.kill()
    # The pool would wait for ever for the rest of a result that one of them was sending; this ends the pipe.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]


def _result(pool: ProcessPoolExecutor, future: Future[Encoded]) -> Encoded:
    """What a task gave; notices a worker that died while it sent a result, for the rest of which the pool waits."""
    while not wait([future], timeout=_LOOK_SECONDS).done:
        if not all(worker.is_alive() for worker in list((pool._processes or {}).values())):
            raise BrokenProcessPool("a worker died")
    return future.result()


def _in_order(
    pool: ProcessPoolExecutor, tasks: Iterator[Task], bytes_on_the_way: int
) -> Generator[tuple[Position, Encoded]]:
    """Keep workers busy with no more bytes on the way than allowed, or a single task that has more."""
    waiting: deque[tuple[int, Position, Future[Encoded]]] = deque()
    ahead: Task | None = None
    failure: DataError | None = None
    on_the_way = 0
    while True:
        while failure is None:
            try:
                ahead = ahead or next(tasks, None)
            except DataError as error:
                failure = error  # it has its turn after what was read before it
            if ahead is None or (waiting and on_the_way + ahead.bytes > bytes_on_the_way):
                break
            on_the_way += ahead.bytes
            waiting.append((ahead.bytes, ahead.end, _submit(pool, ahead)))
            ahead = None
        if not waiting:
            break
        size, end, future = waiting.popleft()
        result = _result(pool, future)
        del future
        on_the_way -= size
        yield end, result
        del result
    if failure is not None:
        raise failure


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[Encoded]:
    """Hand a task to the pool, which may start a worker for it: one that Ctrl-C does not reach before it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it
    try:
        return pool.submit(_encode_in_worker, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_encoder: Encoder | None = None
"""The encoder of this worker process; None in every other process."""


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    # Ctrl-C reaches the whole group; the parent handles it. SIGTERM must end a worker: it is how the pool ends the
    # others when one has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(task: Task) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(task)
