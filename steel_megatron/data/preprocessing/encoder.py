"""Chunks of raw rows -> token ids: the part of preprocessing that worker processes do (encoding_workers.py).

The calling process cuts files into chunks and writes what comes back, in order; everything that costs time is here.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.preprocessing.stored_documents import stored_documents
from steel_megatron.data.reading.chunks import BEGIN, FileOffset, RawChunk
from steel_megatron.data.reading.documents import SkippedRow, text_batches
from steel_megatron.data.reading.sources import Source
from steel_megatron.data.reading.text_batch import TextBatch, as_strings
from steel_megatron.data.tokenizing.chunking import groups, pieces
from steel_megatron.data.tokenizing.gigatoken_engine import FlatIds
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, encode_dialogues

TRAIN, VALID = "train", "valid"
"""Names of the splits."""
SPLIT_BY = "xxh3_64"
"""The hash of a document's text that decides between them."""


@dataclass(frozen=True)
class Position:
    """How far a job has come: everything before it is done."""

    input: int = 0
    """Number of the input file, from 0."""
    place: FileOffset = BEGIN
    """Offset in that file."""


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


class Unwanted(Exception):
    """Nobody waits for a result any more."""


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
    by_threads: bool = False
    """Whether workers are threads: where all but a little is done by compiled code, which they run side by side."""
    long: int = 1 << 20
    """Characters above which a text is encoded in pieces: a tokenizer's library takes 100 times a text in memory."""
    unwanted: threading.Event | None = None
    """Set when nobody waits for results any more; checked while a long text is encoded."""

    def for_thread(self, unwanted: threading.Event) -> Encoder:
        """A twin for another thread, which gives up when nobody waits any more; where gigatoken encodes."""
        return replace(self, tokenizer=self.tokenizer.for_thread(), unwanted=unwanted)

    def encode(self, task: Task) -> Encoded:
        """Parse and encode.

        Raises:
            DataError: a bad row, where those stop the job.
            Unwanted: nobody waits for the result any more.
        """
        found = {key: _Texts() for key in self.sources}
        skipped: list[Skipped] = []
        for number, source, chunk in task.pieces:
            for key, texts in found.items():
                rows = SkippedTo(skipped, number, key)
                for part in text_batches(chunk, self.sources[key][source], self.on_bad_row, rows):
                    texts.add(*part, number)
        documents: dict[tuple[str, str], Documents] = {}
        for key, texts in found.items():
            if texts.parts:
                documents.update(self._split(key, texts))
        return Encoded(documents, skipped)

    def _split(self, key: str, columns: _Texts) -> Iterator[tuple[tuple[str, str], Documents]]:
        texts, dialogue = TextBatch.concatenate(columns.parts), np.concatenate(columns.dialogue)
        rows, inputs, sizes = np.concatenate(columns.rows), np.concatenate(columns.inputs), texts.sizes
        ids, lengths = self._ids(texts, dialogue)
        valid = self._valid(texts)
        for split, which in ((VALID, valid), (TRAIN, ~valid)):
            if which.any():
                eod = self.tokenizer.eod_id if self.append_eod else None
                stored = stored_documents(ids, lengths, which, eod, self.dtype)
                yield (split, key), Documents(*stored, rows[which], inputs[which], sizes[which])

    def _valid(self, texts: TextBatch) -> np.ndarray:
        """Which documents are for validation, bool [documents]: by the text alone, so that none ever changes sides."""
        if not self.valid_fraction:
            return np.zeros(len(texts), dtype=bool)
        seed = self.seed % 2**64
        hashes = (xxhash.xxh3_64_intdigest(text, seed) for text in texts)
        return np.fromiter(hashes, dtype=np.uint64, count=len(texts)) < np.uint64(self.valid_fraction * 2**64)

    def _ids(self, texts: TextBatch, dialogue: np.ndarray) -> FlatIds:
        """Ids and lengths of documents, some of which are dialogues, bool [documents]."""
        if not dialogue.any():
            return self._encode(texts, self.tokenizer.encode_flat)
        if dialogue.all():
            return self._encode(texts, self._encode_dialogues)
        ids, lengths = self._encode(_chosen(texts, ~dialogue), self.tokenizer.encode_flat)
        turns, of_turns = self._encode(_chosen(texts, dialogue), self._encode_dialogues)
        all_lengths = np.empty(len(dialogue), dtype=np.int64)
        all_lengths[dialogue], all_lengths[~dialogue] = of_turns, lengths
        of_dialogue = np.repeat(dialogue, all_lengths)
        all_ids = np.empty(len(of_dialogue), dtype=np.int32)
        all_ids[of_dialogue], all_ids[~of_dialogue] = turns, ids
        return all_ids, all_lengths

    def _encode_dialogues(self, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
        return encode_dialogues(self.tokenizer, texts)

    def _encode(self, texts: TextBatch, encode: Callable[[Sequence[str] | Sequence[bytes]], FlatIds]) -> FlatIds:
        """Ids and lengths of texts; very long ones are encoded in pieces, and not all at once."""
        if int(texts.sizes.max(initial=0)) <= self.long:  # bytes, which are no fewer than characters
            return encode(texts)
        strings = as_strings(texts)
        cut = [pieces(text, self._encode_piece) if len(text) > self.long else [text] for text in strings]
        results = []
        for group in groups(itertools.chain.from_iterable(cut), self.long):
            self._check_wanted()
            results.append(encode(group))
        lengths = np.concatenate([of_group for _, of_group in results])
        ids = np.concatenate([found for found, _ in results])
        return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, cut[:-1])]))

    def _encode_piece(self, text: str) -> list[int]:
        self._check_wanted()
        return self.tokenizer.encode(text)

    def _check_wanted(self) -> None:
        if self.unwanted is not None and self.unwanted.is_set():
            raise Unwanted


def _chosen(texts: TextBatch, which: np.ndarray) -> TextBatch:
    return TextBatch.of([text for text, wanted in zip(texts, which.tolist(), strict=True) if wanted])


class _Texts:
    """The documents of one key in columns."""

    def __init__(self) -> None:
        self.parts: list[TextBatch] = []
        self.rows: list[np.ndarray] = []
        self.inputs: list[np.ndarray] = []
        self.dialogue: list[np.ndarray] = []

    def add(self, texts: TextBatch, rows: np.ndarray, dialogue: bool, number: int) -> None:
        """Append documents of an input.

        Args:
            texts: their texts.
            rows: row of each in its file, from 1, int64 [texts].
            dialogue: whether they are dialogues.
            number: number of the input file, from 0.
        """
        self.parts.append(texts)
        self.rows.append(rows)
        self.inputs.append(np.full(len(texts), number))
        self.dialogue.append(np.full(len(texts), dialogue))


@dataclass(frozen=True)
class SkippedTo:
    """Appends skipped rows to a list."""

    rows: list[Skipped]
    number: int
    key: str

    def __call__(self, row: SkippedRow) -> None:
        self.rows.append(Skipped(self.number, self.key, row))
