"""One epoch of one corpus as samples: documents concatenated in a random order, cut, and the samples shuffled.

A sample is ``sequence_length + 1`` tokens: inputs and, shifted by one, targets. The next one begins at its last token,
so that every token is predicted once; the incomplete last one is dropped. Where each sample begins is an index of 16
bytes per sample, computed in bounded memory and kept in a folder of caches; the orders take no memory. A cache may be
removed at any time and is rebuilt identically.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from steel_megatron.data.indexed.dataset import IndexedCorpus
from steel_megatron.data.indexed.exact_duplicates import bits_of, drop_bits
from steel_megatron.data.native import helpers
from steel_megatron.data.sampling.permutation import Permutation
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, exclusive_lock, remove, sha256_of, sync_folder, write_atomically
from steel_megatron.log import get_logger

logger = get_logger(__name__)

FORMAT = "steel-megatron-packing-1"
"""Name and version of the index; also of how documents are ordered and cut."""
_CHUNK = 1 << 16
"""Documents handled at a time when an index is built."""
_SAMPLES_OF_FILE = 1 << 16
"""Below this many samples (1 MiB), building an index in memory is faster than reading its file."""
_LOCK_SECONDS = 3600.0
"""How long to wait for another process that builds the same index."""
_SECONDS = 2.0
"""An index that takes longer to build is logged."""


class PackedSpan(NamedTuple):
    """A contiguous part of a sample from one document."""

    document: int
    offset: int
    """The document's token with which the span begins."""
    length: int


def documents_of(corpus: IndexedCorpus, samples: Iterable[Iterable[PackedSpan]]) -> np.ndarray:
    """The documents that have tokens in samples, as bits of
    :func:`~steel_megatron.data.indexed.exact_duplicates.drop_bits`.

    Args:
        corpus: that the samples are of.
        samples: the spans of each.
    """
    found = np.zeros(corpus.documents, dtype=bool)
    for spans in samples:
        found[[span.document for span in spans]] = True
    return drop_bits(found)


class PackedEpoch:
    """The samples of one epoch of a corpus.

    Args:
        corpus: the corpus.
        sequence_length: tokens that a sample predicts.
        key: 64-bit numbers: seed, identity of the corpus, number of the epoch.
        dropped: documents to leave out, as bits of :func:`~steel_megatron.data.indexed.exact_duplicates.drop_bits`;
            None for none.
        cache: folder of the indices; None to keep this one in memory.
        content: hex digest of the corpus' content, part of the cache's name; needed with ``cache``.

    Raises:
        DataError: the corpus is shorter than a sample, or the cache cannot be written.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        sequence_length: int,
        key: tuple[int, ...],
        dropped: np.ndarray | None = None,
        cache: Path | None = None,
        content: str | None = None,
    ) -> None:
        self.corpus, self.sequence_length, self._dropped = corpus, sequence_length, dropped
        tokens = corpus.tokens - dropped_tokens(corpus, dropped)
        self.samples = samples_of(tokens, sequence_length)
        if self.samples == 0:
            raise DataError(
                f"{corpus.prefix}: {tokens:,} tokens make no sample of sequence_length + 1 = {sequence_length + 1:,} "
                "tokens; shorten the sequence or use more text"
            )
        self._documents = Permutation(corpus.documents, (*key, 0))
        self._order = Permutation(self.samples, (*key, 1))
        # Where each unshuffled sample begins: position in the document order, token of the document; int64 [N, 2].
        if cache is None or self.samples < _SAMPLES_OF_FILE:
            self._starts = np.concatenate(list(self._build()))
        else:
            assert content is not None
            left_out = None if dropped is None else hashlib.sha256(dropped.tobytes()).hexdigest()
            recipe = {
                "format": FORMAT,
                "content": content,
                "dropped": left_out,
                "sequence_length": sequence_length,
                "key": list(key),
            }
            self._starts = _cached(cache, recipe, self)
        self._reader: Any = None
        if helpers is not None:
            self._reader = helpers.Reader(
                corpus.flat,
                corpus._positions,
                corpus.sizes,
                dropped,
                self._documents.native,
                self._order.native,
                self._starts,
                sequence_length,
            )

    def __len__(self) -> int:
        return self.samples

    def tokens(self, number: int) -> np.ndarray:
        """The ids of sample ``number`` of the shuffled order: int64 [sequence_length + 1]."""
        if self._reader is not None:
            return np.asarray(self._reader.tokens(number))
        return self._join(self.spans(number))

    def with_starts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and where documents begin in it.

        Returns:
            ids, and for each the position in the sample of the first token of its document: int64 [sequence_length + 1]
            both.
        """
        if self._reader is not None:
            tokens, starts = self._reader.with_starts(number)
            return tokens, starts
        spans = self.spans(number)
        lengths = np.array([span.length for span in spans])
        return self._join(spans), np.repeat(np.cumsum(lengths) - lengths, lengths)

    def spans(self, number: int) -> list[PackedSpan]:
        """The spans that a sample consists of, in order."""
        position, offset = (int(value) for value in self._starts[self._order(number)])
        missing, found = self.sequence_length + 1, []
        while missing:
            document = self._documents(position)
            size = 0 if self._is_dropped(document) else int(self.corpus.sizes[document])
            taken = min(size - offset, missing)
            if taken:
                found.append(PackedSpan(document, offset, taken))
                missing, offset = missing - taken, 0
            position += 1
        return found

    def documents_of(self, samples: int) -> np.ndarray:
        """The documents that have tokens in the first samples of the order.

        Returns:
            their bits, as of :func:`~steel_megatron.data.indexed.exact_duplicates.drop_bits`.
        """
        return documents_of(self.corpus, map(self.spans, range(samples)))

    def _is_dropped(self, document: int) -> bool:
        return self._dropped is not None and bool(self._dropped[document >> 3] >> (document & 7) & 1)

    def _join(self, spans: list[PackedSpan]) -> np.ndarray:
        return np.concatenate([self.corpus.tokens_of(*span) for span in spans], dtype=np.int64)

    def _build(self) -> Iterator[np.ndarray]:
        """The index in chunks: int64 [m, 2]."""
        pack = helpers.pack if helpers is not None else None
        missing, before, began = self.samples, 0, time.monotonic()
        for begin in range(0, self.corpus.documents, _CHUNK):
            end = min(begin + _CHUNK, self.corpus.documents)
            if pack is not None:
                arguments = self._documents.native, self.corpus.sizes, self._dropped, self.sequence_length
                chunk, before = pack(*arguments, begin, end, before)
            else:
                chunk, before = pack_by_numpy(
                    self._documents, self.corpus.sizes, self._dropped, self.sequence_length, begin, end, before
                )
            yield chunk[:missing]
            missing -= len(chunk[:missing])
            if not missing:
                break
        assert not missing, (missing, before)
        if time.monotonic() - began > _SECONDS:
            logger.info(f"{self.corpus.prefix}: order of {self.samples:,} samples in {time.monotonic() - began:.0f} s")


def samples_of(tokens: int, sequence_length: int) -> int:
    """The samples that a number of tokens makes."""
    return max(0, (tokens - 1) // sequence_length)


def dropped_tokens(corpus: IndexedCorpus, dropped: np.ndarray | None) -> int:
    """The tokens of the documents that are left out."""
    total = 0
    for begin in range(0, corpus.documents if dropped is not None else 0, _CHUNK):
        assert dropped is not None
        sizes = corpus.sizes[begin : begin + _CHUNK]
        total += int(sizes[bits_of(dropped, begin, begin + len(sizes))].sum(dtype=np.int64))
    return total


def pack_by_numpy(
    order: Permutation, sizes: np.ndarray, dropped: np.ndarray | None, length: int, begin: int, end: int, before: int
) -> tuple[np.ndarray, int]:
    """Where samples begin among the documents of a range of the order; the reference of the compiled ``pack``.

    Args:
        order: of the documents.
        sizes: tokens of each document.
        dropped: bits of documents that are left out, or None.
        length: tokens from one beginning to the next.
        begin: first position in the order.
        end: the position after the last.
        before: tokens of the documents before ``begin``.

    Returns:
        int64 [m, 2], position and offset; and the tokens of the documents before ``end``.
    """
    documents = order.many_by_numpy(np.arange(begin, end))
    own = sizes[documents].astype(np.int64)
    if dropped is not None:
        own[(dropped[documents >> 3] >> (documents & 7).astype(np.uint8) & 1).astype(bool)] = 0
    ends = before + np.cumsum(own)
    marks = np.arange(-(-before // length), -(-int(ends[-1]) // length)) * length
    at = np.searchsorted(ends, marks, side="right")
    return np.stack([begin + at, marks - (ends - own)[at]], axis=1), int(ends[-1])


def _cached(folder: Path, recipe: dict[str, Any], epoch: PackedEpoch) -> np.ndarray:
    """The index from its cache, which is built if it is missing or damaged: int64 [samples, 2], memory-mapped."""
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    path, sidecar = folder / f"{name}.npy", folder / f"{name}.json"
    found = _open_cache(path, sidecar, epoch.samples)
    if found is not None:
        return found
    with exclusive_lock(folder / name, DataError, _LOCK_SECONDS):  # one process builds it, the others then find it
        found = _open_cache(path, sidecar, epoch.samples)
        if found is None:
            digest = _publish(path, epoch)
            record = json.dumps({**recipe, "samples": epoch.samples, "sha256": digest}, indent=2)
            write_atomically(sidecar, record.encode() + b"\n", DataError)
            with disk_errors("read", path, DataError):
                found = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return found


def _publish(path: Path, epoch: PackedEpoch) -> str:
    """Write an index whose file is missing or damaged; returns its SHA-256.

    Where locks do not work, another process may be building the same one, and readers may have mapped it. So a file
    that has appeared in the meantime stays.
    """
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    remove(path)
    try:
        with disk_errors("write", path, DataError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                digest = _write_index(file, epoch)
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                temporary.replace(path)
            sync_folder(path.parent)
    finally:
        remove(temporary)
    return digest


def remove_caches(folder: Path, first_epochs: Mapping[str, int]) -> None:
    """Remove the indices of finished epochs, and what killed processes left.

    Args:
        folder: of the caches.
        first_epochs: by content of a corpus, the number of its current epoch. Indices of other corpora stay.
    """
    for sidecar in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            recipe = json.loads(sidecar.read_bytes())
            if recipe["key"][2] < first_epochs.get(recipe["content"], 0):
                remove(sidecar)
                remove(sidecar.with_suffix(".npy"))
    orphans = (path for path in folder.glob("*.npy") if not path.with_suffix(".json").exists())
    for path in (*folder.glob("*.partial"), *orphans):
        with suppress(OSError, DataError):
            # By age first: where locks do not work, another process may be writing it.
            if time.time() - path.stat().st_mtime > _LOCK_SECONDS:
                with exclusive_lock(folder / path.name.split(".")[0], DataError):
                    remove(path)


def _write_index(file: IO[bytes], epoch: PackedEpoch) -> str:
    """Write the index chunk by chunk; returns its SHA-256."""
    hashed = _Hashed(file)
    header = {"descr": "<i8", "fortran_order": False, "shape": (epoch.samples, 2)}
    npy.write_array_header_1_0(hashed, header)
    for chunk in epoch._build():
        hashed.write(np.ascontiguousarray(chunk, dtype="<i8").data)
    file.flush()
    os.fsync(file.fileno())
    return hashed.digest.hexdigest()


class _Hashed:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.digest.update(content)


def _open_cache(path: Path, sidecar: Path, samples: int) -> np.ndarray | None:
    """The index of a cache; None if there is none, or, with a warning, if it is damaged."""
    try:
        record = json.loads(sidecar.read_bytes())
        intact = sha256_of(path) == record["sha256"]
        found = np.load(path, mmap_mode="r", allow_pickle=False) if intact else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"the cache {path} cannot be read and is rebuilt: {error}")
        return None
    if found is None or found.shape != (samples, 2) or found.dtype != np.int64:
        logger.warning(f"the cache {path} is damaged and is rebuilt")
        return None
    return found.view(np.ndarray)
