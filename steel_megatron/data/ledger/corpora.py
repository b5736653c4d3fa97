"""The corpora of a ledger on disk: described when they are added, compared with that when they are opened."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steel_megatron.data.indexed.dataset import IndexedCorpus, content_hash, open_indexed, refuse_ids
from steel_megatron.data.indexed.exact_duplicates import duplicate_documents
from steel_megatron.data.indexed.labels import has_labels, open_labels
from steel_megatron.data.ledger.locations import place_of, recorded
from steel_megatron.data.ledger.records import NAME, Corpus, DroppedDocuments
from steel_megatron.data.sampling.whole import whole_samples
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, sha256_of
from steel_megatron.log import get_logger

logger = get_logger(__name__)

_CHUNK = 1 << 20
"""Ids that are read at a time."""


def names_of(prefixes: Sequence[str | Path]) -> list[str]:
    """Names for corpora: the last parts of their paths, or the whole paths where those would be equal."""
    counts = Counter(Path(prefix).name for prefix in prefixes)
    return [Path(prefix).name if counts[Path(prefix).name] == 1 else str(prefix) for prefix in prefixes]


def describe(
    prefix: str | Path,
    name: str | None = None,
    domain: str = "default",
    folder: Path | None = None,
    sequence_length: int | None = None,
) -> Corpus:
    """The record of a corpus. A corpus without a manifest is read in full.

    Args:
        prefix: path without a suffix.
        name: its name in commands; None for the last part of the prefix.
        domain: its domain in mixtures.
        folder: the ledger's, to which a relative prefix becomes relative; None makes it absolute.
        sequence_length: the ledger's; None to leave open how many samples whole documents make.

    Raises:
        DataError: the corpus or its labels cannot be used, a document with labels is longer than a sample, or a name is
            empty.
    """
    kept = os.path.abspath(prefix) if folder is None else recorded(prefix, folder)
    prefix = os.path.abspath(prefix)
    name = Path(prefix).name if name is None else name
    for value, what in ((prefix, "prefix"), (name, "name"), (domain, "domain")):
        NAME.check(value, f"the {what} of {prefix!r}")
    corpus = open_indexed(prefix)
    tokenizer = (corpus.manifest or {}).get("tokenizer", {}).get("fingerprint")
    fingerprint = tokenizer if NAME.holds(tokenizer) else None
    max_id = None if corpus.manifest is not None else _largest_id(corpus)
    counts = corpus.documents, corpus.tokens
    record = Corpus(name, kept, content_hash(corpus), domain, *counts, fingerprint, max_id=max_id)
    if not has_labels(corpus):
        return record
    samples = None if sequence_length is None else whole_samples(corpus, sequence_length)
    return dataclasses.replace(record, labels=content_hash(open_labels(corpus)), whole_samples=samples)


def _largest_id(corpus: IndexedCorpus) -> int:
    """The largest token id, after reading all of them.

    Raises:
        DataError: one is negative.
    """
    low = high = 0
    for begin in range(0, corpus.tokens, _CHUNK):
        ids = corpus.flat[begin : begin + _CHUNK]
        low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    if low < 0:
        refuse_ids(corpus, None)
    return high


def open_corpus(record: Corpus, folder: Path, vocab_size: int | None = None) -> IndexedCorpus:
    """Open a corpus and compare it with its record: the counts, and the content if it has a manifest.

    A corpus without a manifest is not read; its largest id is taken from the record.

    Args:
        record: the record.
        folder: the ledger's folder.
        vocab_size: every token id must be below it; None to leave ids unchecked.

    Raises:
        DataError: it is missing, damaged, or not what it was.
    """
    corpus = open_indexed(place_of(record, folder))
    found: dict[str, object] = {"documents": corpus.documents, "tokens": corpus.tokens}
    if corpus.manifest is not None:
        found["content"] = corpus.manifest["content"]
        found["labels"] = content_hash(open_labels(corpus)) if has_labels(corpus) else None
    for field, value in found.items():
        if value != getattr(record, field):
            raise DataError(
                f"corpus {record.name} has changed since it was added to the ledger: {field} of {corpus.prefix} is "
                f"{value}, recorded is {getattr(record, field)}; restore the old files, or remove the corpus and "
                "append the new one under another name"
            )
    if vocab_size is not None:
        largest = record.max_id if corpus.manifest is None else corpus.manifest["max_id"]
        if largest is None or largest >= vocab_size:
            refuse_ids(corpus, vocab_size)
    return corpus


class ReferenceCorpus(NamedTuple):
    """An open corpus whose documents new ones are compared with."""

    corpus: IndexedCorpus
    ignored: np.ndarray | None
    """Bits of the documents that are not compared, as they are not read; None for none."""
    content: str | None
    """Content of the corpus; None if it is out and was read, so that nothing depends on it any more."""


def without_duplicates(
    new: Sequence[Corpus], references: Sequence[ReferenceCorpus], folder: Path, sequence_length: int
) -> tuple[list[Corpus], dict[str, bytes]]:
    """Drop the documents that exactly equal one of the reference corpora, or an earlier one of the new corpora.

    Args:
        new: the new corpora.
        references: what they are compared with.
        folder: the ledger's.
        sequence_length: the ledger's.

    Returns:
        the new corpora, and by name the files that say which documents are dropped.

    Raises:
        DataError: a corpus cannot be read.
    """
    compared, reduced, files = list(references), [], {}
    for record in new:
        corpus = open_corpus(record, folder)
        found = duplicate_documents(corpus, [(reference.corpus, reference.ignored) for reference in compared])
        logger.info(f"{corpus.prefix}: {found.documents:,} of {record.documents:,} documents are dropped as duplicates")
        if found.documents:
            buffer = io.BytesIO()
            np.save(buffer, found.bits, allow_pickle=False)
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            like = [content for number in found.like if (content := compared[number].content) is not None]
            dropped = DroppedDocuments(digest, found.documents, found.tokens, tuple(like))
            files[dropped.file_name] = buffer.getvalue()
            samples = None if record.labels is None else whole_samples(corpus, sequence_length, found.bits)
            record = dataclasses.replace(record, dropped=dropped, whole_samples=samples)
        compared.append(ReferenceCorpus(corpus, found.bits, record.content))
        reduced.append(record)
    return reduced, files


def dropped_bits(record: Corpus, folder: Path) -> np.ndarray | None:
    """The bits of the dropped documents, memory-mapped: uint8 [documents / 8, rounded up]; None if there are none.

    Raises:
        DataError: their file is missing or damaged.
    """
    if record.dropped is None:
        return None
    path = folder / record.dropped.file_name
    with disk_errors("read", path, DataError):
        digest = sha256_of(path)
    if digest != record.dropped.sha256:
        raise DataError(
            f"{path} has changed since documents of {record.name} were dropped: SHA-256 {digest}, the ledger has "
            f"{record.dropped.sha256}; restore it from a copy"
        )
    bits: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if bits.shape != (-(-record.documents // 8),) or bits.dtype != np.uint8:
        raise DataError(f"{path} holds {bits.dtype} {bits.shape}, not the bits of {record.documents:,} documents")
    return bits
