"""The corpora that a preprocessing job makes: each one file set, or several that follow each other (shards)."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.indexed.format import BIN, MANIFEST, SUFFIXES
from steel_megatron.data.indexed.labels import CHAT, LABELS_KEY
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.data.preprocessing.encoder import TRAIN, Documents
from steel_megatron.data.preprocessing.segments import Corpus, Segment
from steel_megatron.data.preprocessing.stored_documents import count_ids
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, remove, sync_folder, with_suffix

_NOTHING = {"sft": "conversation", "pairs": "pair"}


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


class ShardedWriter:
    """Writes documents into ``<prefix>``, or into ``<prefix>_00000``, ``<prefix>_00001``, ... of limited size.

    A document is never cut: a shard has more tokens than the limit only when a single document has.

    Args:
        prefix: path that the corpus is to have, without shard number and suffix.
        folder: where it is written.
        dtype: how ids are stored.
        inputs: what manifests say of each input file.
        about: what they say in addition to the inputs and what the writer itself records.
        shard_size: most tokens of a shard; None for a single corpus.

    Raises:
        DataError: the disk refuses.
    """

    def __init__(
        self,
        prefix: str,
        folder: Path,
        dtype: np.dtype[Any],
        inputs: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
        shard_size: int | None = None,
    ) -> None:
        self.prefix = prefix
        self.shards: dict[str, str] = {}
        """Those that are complete: their identity, as in the manifest, by the path that they are to have."""
        self.per_source: dict[str, CorpusCounts] = {}
        """What was written, by the name of the source."""
        self._folder, self._dtype, self._inputs, self._about = folder, dtype, inputs, about
        self._shard_size = shard_size
        self._open()

    def _open(self) -> None:
        self._name = f"{self.prefix}_{len(self.shards):05d}" if self._shard_size else self.prefix
        self._per_input: dict[int, CorpusCounts] = {}
        self._writer = IndexedWriter(_before_named(self._folder, self._name), self._dtype, overwrite=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.__exit__()

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(counts.documents for counts in self.per_source.values())

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(counts.tokens for counts in self.per_source.values())

    def add(self, documents: Documents) -> None:
        """Append documents.

        Raises:
            DataError: the disk is full.
        """
        if not self._shard_size:
            self._append(documents)
            return
        ends = np.cumsum(documents.lengths)
        start = 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            room = self._shard_size - self._writer.tokens
            stop = int(np.searchsorted(ends, before + room, side="right"))
            if stop <= start and self._writer.documents:
                self.finish()
                self._open()
                continue
            stop = max(stop, start + 1)  # a document that is longer than a shard
            self._append(documents.part(start, stop))
            start = stop

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

    def finish(self) -> None:
        """Complete the shard in progress.

        Raises:
            DataError: the disk is full.
        """
        manifest: dict[str, Any] = dict(self._about)
        if self._shard_size:
            manifest["shard"] = len(self.shards)
        manifest["inputs"] = [
            {**self._inputs[number], **asdict(counts)} for number, counts in sorted(self._per_input.items())
        ]
        self.shards[self._name] = self._writer.finalize(manifest)["content"]


class Corpora:
    """All corpora of a job, written in the order of the inputs into ``<job's folder>/corpora``.

    Args:
        job: what decides the bytes of the outputs, as JSON: ``settings``, which the manifests repeat, ``inputs``,
            ``shard_size``.
        outputs: path that each corpus is to have, without shard number and suffix, by split and key.
        dtype: how ids are stored.
        folder: the job's folder.
        left_out: what the inputs hold in addition to what is read.

    Raises:
        DataError: the disk refuses.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        outputs: Mapping[Corpus, str],
        dtype: np.dtype[Any],
        folder: Path,
        left_out: Mapping[str, Any],
    ) -> None:
        self.job, self.folder = job, folder / "corpora"
        self.left_out = left_out
        self.outputs: dict[Corpus, ShardedWriter] = {}
        self.skipped_rows: dict[str, int] = {}
        """Rows that gave no document, by source."""
        self.token_counts = np.zeros(job["settings"]["tokenizer"]["vocab_size"], dtype=np.int64)
        """How often each token was written to the training split [vocabulary]."""
        # Manifests are the same wherever and whenever a file was copied; its age only shows this job that it changed.
        inputs = [{name: value for name, value in entry.items() if name != "mtime_ns"} for entry in job["inputs"]]
        with disk_errors("remove", self.folder, DataError):
            if self.folder.exists():
                shutil.rmtree(self.folder)
        with ExitStack() as opened:
            for (split, key), prefix in outputs.items():
                about = {**job["settings"], "split": split, "key": key}
                if left_out:
                    about["left_out"] = left_out
                writer = ShardedWriter(prefix, self.folder, dtype, inputs, about, job["shard_size"])
                self.outputs[split, key] = opened.enter_context(writer)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def counted(self) -> dict[Corpus, ShardedWriter]:
        """The outputs that hold texts: those of labels are left out."""
        chat = CHAT in self.job["settings"]
        return {corpus: out for corpus, out in self.outputs.items() if not (chat and corpus[1] == LABELS_KEY)}

    @property
    def skipped(self) -> int:
        """Rows that gave no document."""
        return sum(self.skipped_rows.values())

    def add(self, documents: Mapping[Corpus, Documents]) -> None:
        """Append documents.

        Raises:
            DataError: the disk is full.
        """
        for (split, key), found in documents.items():
            self.outputs[split, key].add(found)
            if split == TRAIN and (split, key) in self.counted:
                count_ids(self.token_counts, found.ids)

    def finish(self, segments: Iterable[Segment], skipped: Path) -> None:
        """Complete the corpora and the list of skipped rows.

        Args:
            segments: all segments of the job, in the order of the inputs.
            skipped: file for the JSON lines of the skipped rows; not made when there are none.

        Raises:
            DataError: a corpus got no document, a segment is damaged, or the disk is full.
        """
        with disk_errors("write", skipped, DataError), skipped.open("wb") as file:
            for segment in segments:
                for source, count in segment.skipped_rows.items():
                    self.skipped_rows[source] = self.skipped_rows.get(source, 0) + count
                file.write(segment.skipped())
            file.flush()
            os.fsync(file.fileno())
        if not self.skipped:
            remove(skipped)
        self._check_not_empty()
        for writer in self.outputs.values():
            writer.finish()

    def _check_not_empty(self) -> None:
        for (split, key), writer in self.outputs.items():
            documents = sum(other.documents for (_, of_key), other in self.outputs.items() if of_key == key)
            if documents == 0:
                what = _NOTHING.get(self.job["settings"].get(CHAT, {}).get("kind"), f"document under key {key!r}")
                raise EmptyCorpus(f"the inputs hold no {what} ({self.skipped:,} rows were skipped)")
            if writer.documents == 0:
                fraction = self.job["settings"]["valid_fraction"]
                raise EmptyCorpus(
                    f"the {split} split got none of {documents:,} documents with valid_fraction = {fraction}; choose "
                    "a fraction nearer to one half, or another seed, or 0 for no split"
                )
            if writer.tokens == 0:
                raise EmptyCorpus(
                    f"the tokenizer makes no token of any of the {writer.documents:,} documents under key {key!r} in "
                    f"the {split} split; a corpus needs tokens: end documents in a token of their own with append_eod"
                )


class EmptyCorpus(DataError):
    """A corpus got no document or no token: running the same job again would come to the same."""


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise a DataError when corpora are there, in one piece or in shards, and may not be replaced."""
    found = corpora_at(prefix)
    if found and not overwrite:
        raise DataError(_exists(found[0]))


def corpora_at(prefix: str) -> list[str]:
    """Prefixes of the corpora that a job may have written under a prefix: itself, and its shards."""
    shard = re.compile(re.escape(Path(prefix).name) + r"(_\d{5,})?")
    found = set()
    for suffix in SUFFIXES:
        for path in glob.glob(f"{glob.escape(prefix)}*{suffix}"):
            if shard.fullmatch(Path(path).name.removesuffix(suffix)):
                found.add(path.removesuffix(suffix))
    return sorted(found)


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


_ESCAPED = re.compile(r"[%/\\*?\[\]\x00-\x1f\x7f]")


def file_name_of(key: str) -> str:
    """A key as it is in the names of files: what could name a folder or be a pattern is escaped, as in an address."""
    return _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", key)


def _before_named(corpora: Path, prefix: str) -> Path:
    """Where in a job's folder a corpus lies before it has its name."""
    return corpora / Path(prefix).name


def publish(corpora: Path, shards: Mapping[str, str], outputs: Iterable[str], overwrite: bool) -> None:
    """Give complete corpora their names, the manifest of each last; run again, it completes what a kill cut short.

    Args:
        corpora: the folder they lie in.
        shards: identity of each, by the path it is to have.
        outputs: those paths without shard numbers; corpora of an earlier job there are removed.
        overwrite: whether there may be any.

    Raises:
        DataError: a corpus is there and may not be replaced, or the disk refuses.
    """
    waiting = [prefix for prefix in shards if with_suffix(_before_named(corpora, prefix), BIN).exists()]
    earlier = [found for output in outputs for found in corpora_at(output) if found in waiting or found not in shards]
    if earlier and not overwrite:
        raise DataError(_exists(earlier[0]))
    for prefix in earlier:
        remove_corpus(prefix)
    for prefix in shards:
        source, folder = _before_named(corpora, prefix), Path(prefix).parent
        with disk_errors("rename", Path(prefix), DataError):
            folder.mkdir(parents=True, exist_ok=True)
            for suffix in SUFFIXES:
                if suffix == MANIFEST:
                    sync_folder(folder)  # it vouches for the others, so it must not be there without them
                if with_suffix(source, suffix).exists():
                    with_suffix(source, suffix).replace(with_suffix(prefix, suffix))
            sync_folder(folder)


def _exists(prefix: str) -> str:
    return f"{prefix}.bin exists already; choose another prefix, or allow it to be replaced with --overwrite true"
