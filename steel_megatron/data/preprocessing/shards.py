"""One output of a preprocessing job: a corpus, or several that follow each other (shards)."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.format import SUFFIXES, partial
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.data.preprocessing.encoder import Documents
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, remove, with_suffix


@dataclass
class CorpusCounts:
    """Of documents."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Count more.

        Args:
            documents: number of documents.
            tokens: their tokens.
            text_bytes: bytes of their texts in UTF-8.
        """
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes


@dataclass(frozen=True)
class Shard:
    """A shard that is complete."""

    prefix: str
    documents: int
    tokens: int
    content: str | None
    """Its identity, as in its manifest."""


class ShardedWriter:
    """Writes documents into ``<prefix>``, or into ``<prefix>_00000``, ``<prefix>_00001``, ... of limited size.

    A shard appears when it is full; the last one, or the only one, with :meth:`prepare` and :meth:`commit`. A document
    is never cut: a shard has more tokens than the limit only when a single document has.

    Args:
        prefix: path of the corpus without shard number and suffix.
        dtype: how ids are stored.
        inputs: what manifests say of each input file.
        about: what they say beside the inputs and what the writer itself records.
        shard_size: most tokens of a shard; None for a single corpus.
        overwrite: whether corpora that are there may be replaced.
        state: what :meth:`state` gave, to go on with an interrupted write; None to begin.

    Raises:
        DataError: a corpus is there and may not be replaced, the interrupted files are not what the state describes,
            or the disk refuses.
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype[Any],
        inputs: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
        shard_size: int | None = None,
        overwrite: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.prefix = prefix
        self.shards: list[Shard] = []
        """Those that are complete."""
        self.per_source: dict[str, CorpusCounts] = {}
        """What was written, by the name of the source."""
        self._dtype, self._inputs, self._about = dtype, inputs, about
        self._shard_size, self._overwrite = shard_size, overwrite
        self._per_input: dict[int, CorpusCounts] = {}
        """What the shard in progress has of each input, by its number."""
        self._completing = self._committing = False
        if state is None:
            refuse_existing(prefix, overwrite)
        else:
            self.shards = [Shard(**shard) for shard in state["shards"]]
            self.per_source = {name: CorpusCounts(**counts) for name, counts in state["per_source"].items()}
            self._per_input = {int(number): CorpusCounts(**counts) for number, counts in state["per_input"].items()}
            for shard in self.shards:
                _check_still_there(shard)
            if not overwrite:  # what is beyond the noted shard can only be of the interrupted job itself
                for beyond in set(corpora_at(prefix)) - {shard.prefix for shard in self.shards} - {self._prefix()}:
                    remove_corpus(beyond)
        self._writer = self._open(None if state is None else state["writer"])

    def _open(self, state: Mapping[str, Any] | None = None) -> IndexedWriter:
        return IndexedWriter(self._prefix(), self._dtype, self._overwrite, state)

    def _prefix(self) -> str:
        """That of the shard in progress."""
        return f"{self.prefix}_{len(self.shards):05d}" if self._shard_size else self.prefix

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards) + (0 if self._committing else self._writer.documents)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards) + (0 if self._committing else self._writer.tokens)

    def add(self, documents: Documents) -> bool:
        """Append documents; returns whether a shard became full, which is the time to note :meth:`state`.

        Raises:
            DataError: the disk is full.
        """
        if not self._shard_size:
            self._append(documents)
            return False
        ends = np.cumsum(documents.lengths)
        start, begun = 0, len(self.shards)
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            room = self._shard_size - self._writer.tokens
            stop = int(np.searchsorted(ends, before + room, side="right"))
            if stop <= start and self._writer.documents:
                self._next_shard()
                continue
            stop = max(stop, start + 1)  # a document that is longer than a shard
            self._append(documents.part(start, stop))
            start = stop
        return len(self.shards) > begun

    def _append(self, documents: Documents) -> None:
        self._writer.add_documents(documents.ids, documents.lengths, documents.rows)
        numbers, first = np.unique(documents.inputs, return_index=True)  # they come in order
        for number, start, stop in zip(numbers.tolist(), first, [*first[1:], len(documents.inputs)], strict=True):
            tokens, text_bytes = (int(values[start:stop].sum()) for values in (documents.lengths, documents.text_bytes))
            source = self._inputs[number]["source"]
            for counts in (
                self._per_input.setdefault(number, CorpusCounts()),
                self.per_source.setdefault(source, CorpusCounts()),
            ):
                counts.add(int(stop - start), tokens, text_bytes)

    def _next_shard(self) -> None:
        self.prepare()
        self.commit()
        self._per_input = {}
        self._writer = self._open()
        self._completing = self._committing = False

    def prepare(self) -> None:
        """Complete the shard in progress on disk, still under its temporary names."""
        self._completing = True
        manifest: dict[str, Any] = dict(self._about)
        if self._shard_size:
            manifest["shard"] = len(self.shards)
        manifest["inputs"] = [
            {**self._inputs[number], **asdict(counts)} for number, counts in sorted(self._per_input.items())
        ]
        self._writer.prepare(manifest)

    def commit(self) -> None:
        """Give it its final names; the first one replaces all shards of an earlier job."""
        self._committing = True
        if not self.shards:
            for stale in set(corpora_at(self.prefix)) - {self._writer.prefix}:
                remove_corpus(stale)
        self._writer.commit()
        self.shards.append(
            Shard(self._writer.prefix, self._writer.documents, self._writer.tokens, content_of(self._writer.prefix))
        )

    def state(self) -> dict[str, Any]:
        """What is written so far, as JSON; it is on disk when this returns.

        Raises:
            DataError: the disk is full, or a write before was cut short.
        """
        if self._completing:
            raise DataError(f"{self._writer.prefix} was being completed; an earlier state is what there is")
        return {
            "writer": self._writer.state(),
            "shards": [asdict(shard) for shard in self.shards],
            "per_source": {name: asdict(counts) for name, counts in self.per_source.items()},
            "per_input": {str(number): asdict(counts) for number, counts in self._per_input.items()},
        }

    def suspend(self) -> None:
        """Leave everything as it is for a job that goes on from a noted state."""
        if not self._committing:
            self._writer.suspend()

    def discard(self) -> None:
        """Remove everything that was written."""
        if not self._committing:
            self._writer.discard()
        for shard in reversed(self.shards):
            remove_corpus(shard.prefix)


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise a DataError when corpora are there, in one piece or in shards, and may not be replaced."""
    found = corpora_at(prefix)
    if found and not overwrite:
        raise DataError(
            f"{found[0]}.bin exists already; choose another prefix, or allow it to be replaced with overwrite"
        )


def corpora_at(prefix: str, ending: str = "") -> list[str]:
    """Prefixes of the corpora that a job may have written under a prefix: itself, and its shards.

    Args:
        prefix: path of the corpus without shard number and suffix.
        ending: what follows the suffix of their files.
    """
    shard = re.compile(re.escape(Path(prefix).name) + r"(_\d{5,})?")
    found = set()
    for suffix in SUFFIXES:
        for path in glob.glob(f"{glob.escape(prefix)}*{suffix}{ending}"):
            if shard.fullmatch(Path(path).name.removesuffix(suffix + ending)):
                found.add(path.removesuffix(suffix + ending))
    return sorted(found)


def remove_partial(prefix: str) -> None:
    """Remove what an unfinished job left of a corpus, in one piece or in shards."""
    for unfinished in corpora_at(prefix, os.fspath(partial(Path("x")))[1:]):
        for suffix in SUFFIXES:
            remove(partial(with_suffix(unfinished, suffix)))


def remove_corpus(prefix: str) -> None:
    """Remove the files of a corpus, as far as they are there.

    Raises:
        DataError: one cannot be removed.
    """
    for suffix in reversed(SUFFIXES):  # the manifest first
        path = with_suffix(prefix, suffix)
        with disk_errors("remove", path, DataError):
            path.unlink(missing_ok=True)


def content_of(prefix: str) -> str | None:
    """The identity of a corpus' tokens, as its manifest has it; None without a manifest.

    Raises:
        DataError: the corpus is damaged.
    """
    manifest = open_indexed(prefix).manifest
    return None if manifest is None else manifest["content"]


def _check_still_there(shard: Shard) -> None:
    if content_of(shard.prefix) != shard.content:
        raise DataError(f"{shard.prefix}, a shard of the interrupted job, was replaced; start again with overwrite")
