"""Chunks of raw rows -> token ids: the part of preprocessing that worker processes do (encoding_workers.py).

The calling process cuts files into chunks and writes what comes back, in order; everything that costs time is here.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steel_megatron.data.fast_encoding import as_texts
from steel_megatron.data.formats import Place, RawChunk
from steel_megatron.data.long_texts import pieces
from steel_megatron.data.named_sources import Source
from steel_megatron.data.sources import BadRowPolicy, SkippedRow, documents_of, plain_texts
from steel_megatron.data.tokenizer import Tokenizer, encode_dialogues

TRAIN, VALID = "train", "valid"
"""Names of the splits."""

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
                reader = self.sources[key][source]
                plain = plain_texts(chunk, reader)
                if plain is not None:
                    texts.add(*plain, number)
                    continue
                rows = _SkippedTo(skipped, number, key)
                for document in documents_of(chunk, reader, self.on_bad_row, rows):
                    texts.add([document.text.encode()], [document.row], number, document.dialogue)
        documents: dict[tuple[str, str], Documents] = {}
        for key, texts in found.items():
            if texts.contents:
                documents.update(self._split(key, texts))
        return Encoded(documents, skipped)

    def _split(self, key: str, texts: _Texts) -> Iterator[tuple[tuple[str, str], Documents]]:
        ids, lengths = self._ids(texts)
        text_bytes, valid = np.empty(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=bool)
        keyed = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        for at, content in enumerate(texts.contents):
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

    def _encode_dialogues(self, texts: Sequence[str] | Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return encode_dialogues(self.tokenizer, texts)

    def _encode(
        self,
        texts: Sequence[bytes],
        encode: Callable[[Sequence[str] | Sequence[bytes]], tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of texts; very long ones are encoded in pieces, and not all at once."""
        if sum(map(len, texts)) <= self.long:  # bytes, which are no fewer than characters
            return encode(texts)
        strings = as_texts(texts)
        cut = [pieces(text, self.tokenizer.encode) if len(text) > self.long else [text] for text in strings]
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
    """The documents of one key in columns, texts in UTF-8."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []
        self.rows: list[int] = []
        self.inputs: list[int] = []
        self.dialogue: list[bool] = []

    def add(self, contents: Sequence[bytes], rows: Sequence[int], number: int, dialogue: bool = False) -> None:
        """Append documents of an input."""
        self.contents += contents
        self.rows += rows
        self.inputs += [number] * len(rows)
        self.dialogue += [dialogue] * len(rows)


@dataclass(frozen=True)
class _SkippedTo:
    """Appends skipped rows to a list."""

    rows: list[Skipped]
    number: int
    key: str

    def __call__(self, row: SkippedRow) -> None:
        self.rows.append(Skipped(self.number, self.key, row))
