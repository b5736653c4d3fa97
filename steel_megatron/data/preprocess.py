"""Documents -> indexed corpora of token ids: parallel, deterministic, in bounded memory.

One process reads the inputs in order and cuts them into chunks of documents; workers encode the chunks; the
results are written in the order of the inputs. So the files are the same, byte for byte, for any number of workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from steel_megatron.config import TokenizerKind
from steel_megatron.data.indexed import token_dtype
from steel_megatron.data.indexed_writer import IndexedWriter, refuse_existing
from steel_megatron.data.sources import (
    BadRowPolicy,
    Document,
    SkippedRow,
    expand_inputs,
    has_keys,
    read_documents,
)
from steel_megatron.data.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.files import exclusive_lock
from steel_megatron.log import Progress, get_logger, progress

TRAIN, VALID = "train", "valid"
"""Names of the splits."""

_CHUNK_CHARACTERS = 1 << 19
_CHUNK_DOCUMENTS = 1024
"""A chunk is closed at either."""
_CHUNKS_PER_WORKER = 3
"""Chunks that are on the way at a time; more would only take memory."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class PreprocessReport:
    """What :func:`preprocess` read and wrote. ``documents + skipped`` is the number of rows that were read."""

    documents: int
    """Documents written, over all outputs."""
    skipped: int
    """Rows that gave no document."""
    tokens: int
    """Tokens written, over all outputs."""
    bytes: int
    """Bytes of the documents' text in UTF-8."""
    seconds: float
    """Wall time."""
    outputs: dict[str, str]
    """Prefix of each corpus by split (``train``, ``valid``); ``<split>.<key>`` when there are several keys."""
    split_documents: dict[str, int]
    """Documents of each output."""
    split_tokens: dict[str, int]
    """Tokens of each output."""
    unigram_entropy: float
    """Nats per token of the distribution of single tokens in the training split: the loss of a model that knows
    nothing but how often each token occurs."""


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer_kind: TokenizerKind,
    tokenizer_path: str | Path,
    json_keys: Sequence[str] = ("text",),
    workers: int = 1,
    append_eod: bool = True,
    valid_fraction: float = 0.0,
    on_bad_row: BadRowPolicy = "stop",
    overwrite: bool = False,
    seed: int = 0,
) -> PreprocessReport:
    """Tokenize documents into indexed corpora.

    Without a validation split the corpus of a key is ``<output_prefix>_<key>_document``; with one,
    ``<output_prefix>_train_<key>_document`` and ``<output_prefix>_valid_<key>_document``. A document's split follows
    from its text and ``seed`` alone: it never moves, and copies of it fall on the same side. Nothing appears under
    these names unless everything succeeded. Rows that gave no document are listed in
    ``<output_prefix>_skipped.jsonl``.

    Args:
        inputs: files, folders and patterns, see :func:`~steel_megatron.data.sources.expand_inputs`.
        output_prefix: begin of all output paths; missing folders are made.
        tokenizer_kind: ``huggingface`` or ``sentencepiece``.
        tokenizer_path: its folder or file.
        json_keys: keys of the JSON rows whose texts become corpora, one each.
        workers: processes that encode; with 1 the calling process does.
        append_eod: whether each document ends in the tokenizer's end-of-document id.
        valid_fraction: share of documents for validation; 0 for no split.
        on_bad_row: ``stop`` at a row that cannot be read, or ``skip`` it.
        overwrite: whether corpora that are there may be replaced.
        seed: enters the choice of the split.

    Raises:
        ConfigError: an argument is out of range.
        DataError: inputs, tokenizer or outputs cannot be used, a worker died, or a split got no document.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be stop or skip")
    if workers < 1 or not 0 <= valid_fraction < 1 or not json_keys or len(set(json_keys)) < len(json_keys):
        raise ConfigError(
            f"workers = {workers} must be at least 1, valid_fraction = {valid_fraction} at least 0 and below 1, "
            f"json_keys = {list(json_keys)} at least one key and none twice"
        )
    if not Path(output_prefix).name or os.fspath(output_prefix).endswith(os.sep):
        raise ConfigError(f"output_prefix is {os.fspath(output_prefix)!r}; it must end in a name, such as data/corpus")
    started = time.monotonic()
    job = _Job(os.fspath(output_prefix), _sizes(expand_inputs(inputs), json_keys), tuple(json_keys), on_bad_row)
    splits = (TRAIN, VALID) if valid_fraction else (TRAIN,)
    prefixes = {
        (split, key): f"{output_prefix}{f'_{split}' if valid_fraction else ''}_{key}_document"
        for key in json_keys
        for split in splits
    }
    for prefix in prefixes.values():
        refuse_existing(prefix, overwrite)
    tokenizer = load_tokenizer(tokenizer_kind, tokenizer_path)
    encoder = _Encoder(tokenizer, token_dtype(tokenizer.vocab_size), append_eod, valid_fraction, seed)
    with exclusive_lock(output_prefix, DataError), ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(prefix, encoder.dtype, overwrite))
            for name, prefix in prefixes.items()
        }
        skipped = stack.enter_context(_SkippedRows(job.prefix))
        counts, text_bytes = _encode_all(job, encoder, workers, writers, skipped)
        _check_not_empty(writers, skipped.count, valid_fraction)
        for (split, key), writer in writers.items():
            writer.prepare({**_about(job, tokenizer_kind, encoder), "split": split, "key": key})
        for writer in writers.values():
            writer.commit()
        skipped.commit()
    report = _report(writers, skipped.count, text_bytes, time.monotonic() - started, counts)
    _log.info(
        f"preprocess: {report.documents + report.skipped:,} documents in = {report.documents:,} written + "
        f"{report.skipped:,} skipped; {report.tokens:,} tokens, {report.bytes / max(report.tokens, 1):.2f} bytes each, "
        f"{report.bytes / 1e6 / max(report.seconds, 1e-9):.1f} MB/s"
    )
    return report


@dataclass(frozen=True)
class _Job:
    """What to read."""

    prefix: str
    sizes: dict[Path, int]
    """The input files, in order, and their bytes."""
    keys: tuple[str, ...]
    on_bad_row: BadRowPolicy

    def documents(self, key: str, on_skip: Callable[[SkippedRow], None], bar: Progress) -> Iterator[Document]:
        """All documents of one key, in order."""
        for path in self.sizes:
            yield from read_documents(path, key, self.on_bad_row, on_skip, on_bytes=bar.advance)


def _sizes(files: list[Path], json_keys: Sequence[str]) -> dict[Path, int]:
    """Bytes of the input files; refuses files without keys where several keys are asked for."""
    sizes = {}
    for path in files:
        if len(json_keys) > 1 and not has_keys(path):
            raise DataError(f"{path} has no keys to choose from; give it to a run with a single json key")
        try:
            sizes[path] = path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
    return sizes


@dataclass(frozen=True)
class _Encoder:
    """Texts -> ids of each split; the part of the work that is done in workers."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    append_eod: bool
    valid_fraction: float
    seed: int

    def split_of(self, content: bytes) -> str:
        """The split of a document by its text."""
        if not self.valid_fraction:
            return TRAIN
        digest = hashlib.blake2b(content, digest_size=8, key=str(self.seed).encode()).digest()
        return VALID if int.from_bytes(digest, "big") < self.valid_fraction * 2**64 else TRAIN

    def encode(self, texts: Sequence[str]) -> _Encoded:
        """Encode a chunk of documents."""
        end = np.array([self.tokenizer.eod_id] if self.append_eod else [], dtype=np.int32)
        documents: dict[str, list[np.ndarray]] = {}
        text_bytes = 0
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            content = text.encode()
            text_bytes += len(content)
            documents.setdefault(self.split_of(content), []).append(np.concatenate((ids, end)))
        return _Encoded(
            {
                # Cast here to send half as many bytes; ids are below vocab_size, which the dtype holds.
                split: (np.concatenate(parts).astype(self.dtype), np.array([len(ids) for ids in parts]))
                for split, parts in documents.items()
            },
            text_bytes,
        )


def _about(job: _Job, tokenizer_kind: TokenizerKind, encoder: _Encoder) -> dict[str, Any]:
    """What the manifests record of how a corpus was made; nothing that changes from run to run."""
    return {
        "tokenizer": {
            "kind": tokenizer_kind,
            "fingerprint": encoder.tokenizer.fingerprint,
            "vocab_size": encoder.tokenizer.vocab_size,
            "eod_id": encoder.tokenizer.eod_id,
        },
        "append_eod": encoder.append_eod,
        "valid_fraction": encoder.valid_fraction,
        "seed": encoder.seed,
        "inputs": [{"path": str(path), "bytes": size} for path, size in job.sizes.items()],
    }


@dataclass(frozen=True)
class _Encoded:
    """A chunk's documents."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    """Of each split: ids [tokens] and lengths [documents]."""
    text_bytes: int


class _SkippedRows:
    """Lists skipped rows in a file that appears when it is committed, and only if there are any."""

    def __init__(self, prefix: str) -> None:
        self.count = 0
        self.key = ""
        self._path = Path(f"{prefix}_skipped.jsonl")
        self._partial = Path(f"{self._path}.partial")
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the rest of the buffer on a full disk; the file goes anyway
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            self._partial.unlink()

    def add(self, row: SkippedRow) -> None:
        self.count += 1
        try:
            if self._file is None:
                self._file = self._partial.open("w", encoding="utf-8")
            self._file.write(json.dumps({**asdict(row), "key": self.key}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def commit(self) -> None:
        try:
            if self._file is None:
                self._path.unlink(missing_ok=True)  # of an earlier run that is replaced
                return
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error
        _log.warning(f"{self.count:,} rows were skipped; they are listed in {self._path}")


def _encode_all(
    job: _Job,
    encoder: _Encoder,
    workers: int,
    writers: dict[tuple[str, str], IndexedWriter],
    skipped: _SkippedRows,
) -> tuple[np.ndarray, int]:
    """Write all documents; returns how often each id occurs in training [vocab_size] and the bytes of text."""
    counts = np.zeros(encoder.tokenizer.vocab_size, dtype=np.int64)
    text_bytes = 0
    with progress("preprocess", sum(job.sizes.values()) * len(job.keys), "bytes") as bar:
        for key in job.keys:
            skipped.key = key
            chunks = _chunks(job.documents(key, skipped.add, bar))
            with closing(_encoded_chunks(chunks, encoder, workers)) as encoded_chunks:
                for encoded in encoded_chunks:
                    text_bytes += encoded.text_bytes
                    for split, (ids, lengths) in encoded.splits.items():
                        writers[split, key].add_documents(ids, lengths)
                        if split == TRAIN:
                            counts += np.bincount(ids, minlength=len(counts))
    return counts, text_bytes


def _chunks(documents: Iterable[Document]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document.text)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded_chunks(chunks: Iterator[list[str]], encoder: _Encoder, workers: int) -> Generator[_Encoded]:
    """Encode chunks, in order, here or in worker processes."""
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    # Spawned, not forked: the calling process may have threads (of a tokenizer, of torch) that a fork would cut off.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    )
    try:
        waiting: deque[Future[_Encoded]] = deque()
        waiting.extend(
            pool.submit(_encode_in_worker, chunk) for chunk in itertools.islice(chunks, workers * _CHUNKS_PER_WORKER)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_encode_in_worker, chunk) for chunk in itertools.islice(chunks, 1))
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} worker processes died (killed, perhaps for want of memory); nothing was written. "
            "Run again, with fewer workers if memory is short"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: _Encoder | None = None
"""The encoder of this worker process; None in every other process."""


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(texts)


def _check_not_empty(writers: dict[tuple[str, str], IndexedWriter], skipped: int, valid_fraction: float) -> None:
    for (split, key), writer in writers.items():
        documents = sum(other.documents for (_, of_key), other in writers.items() if of_key == key)
        if documents == 0:
            raise DataError(f"the inputs hold no document under key {key!r} ({skipped:,} rows were skipped)")
        if writer.documents == 0:
            raise DataError(
                f"the {split} split got none of {documents:,} documents with valid_fraction = {valid_fraction}; choose "
                "a fraction nearer to one half, or another seed, or 0 for no split"
            )


def _report(
    writers: dict[tuple[str, str], IndexedWriter], skipped: int, text_bytes: int, seconds: float, counts: np.ndarray
) -> PreprocessReport:
    several = len({key for _, key in writers}) > 1
    named = {f"{split}.{key}" if several else split: writer for (split, key), writer in writers.items()}
    frequencies = counts[counts > 0] / counts.sum()
    return PreprocessReport(
        documents=sum(writer.documents for writer in named.values()),
        skipped=skipped,
        tokens=sum(writer.tokens for writer in named.values()),
        bytes=text_bytes,
        seconds=seconds,
        outputs={name: writer.prefix for name, writer in named.items()},
        split_documents={name: writer.documents for name, writer in named.items()},
        split_tokens={name: writer.tokens for name, writer in named.items()},
        unigram_entropy=float(-(frequencies * np.log(frequencies)).sum()),
    )
