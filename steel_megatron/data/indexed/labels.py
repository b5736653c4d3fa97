"""Corpora with labels: which tokens are predicted is in a second corpus next to the first, with the same documents."""

from __future__ import annotations

import numpy as np

from steel_megatron.data.indexed.dataset import IndexedCorpus, open_indexed
from steel_megatron.errors import DataError

TOKENS_KEY, LABELS_KEY = "messages", "labels"
"""The keys in the names of the two: ``PREFIX_messages_document`` and ``PREFIX_labels_document``."""
LABEL, SECOND, SHORTENED = 1, 2, 4
"""Bits of a token in the labels: it is predicted; with it begins the second text of a pair; it is the last one of a
document that was too long."""
CHAT = "chat"
"""The field of a manifest that says that there are labels, and how they were made."""


def has_labels(corpus: IndexedCorpus) -> bool:
    """Whether there is a corpus of labels for this one."""
    return corpus.manifest is not None and CHAT in corpus.manifest


def kind_of(corpus: IndexedCorpus) -> str | None:
    """What a corpus with labels holds, by its manifest: ``sft`` or ``pairs``; None if that is not recorded."""
    chat = (corpus.manifest or {}).get(CHAT)
    kind = chat.get("kind") if isinstance(chat, dict) else None
    return kind if kind in ("sft", "pairs") else None


def labels_prefix(prefix: str) -> str:
    """Where the labels of a corpus lie; of one that was merged or renamed, at its prefix with ``.labels`` appended."""
    before, found, behind = prefix.rpartition(f"_{TOKENS_KEY}_document")
    return f"{before}_{LABELS_KEY}_document{behind}" if found else f"{prefix}.labels"


def tokens_prefix(prefix: str) -> str:
    """Where the corpus lies whose labels are at ``prefix``."""
    before, found, behind = prefix.rpartition(f"_{LABELS_KEY}_document")
    return f"{before}_{TOKENS_KEY}_document{behind}" if found else prefix.removesuffix(f".{LABELS_KEY}")


def open_labels(corpus: IndexedCorpus) -> IndexedCorpus:
    """The labels of a corpus, checked against it.

    Raises:
        DataError: they are missing, damaged, or of other documents.
    """
    prefix = labels_prefix(corpus.prefix)
    if (corpus.manifest or {}).get("key") == LABELS_KEY:
        raise DataError(f"{corpus.prefix} holds labels, not tokens; name {tokens_prefix(corpus.prefix)}")
    try:
        labels = open_indexed(prefix)
    except DataError as error:
        raise DataError(f"the labels of {corpus.prefix} cannot be read: {error}") from None
    if not np.array_equal(labels.sizes, corpus.sizes):
        raise DataError(
            f"{prefix} has {labels.documents:,} documents with {labels.tokens:,} tokens, {corpus.prefix} has "
            f"{corpus.documents:,} with {corpus.tokens:,}, or the lengths differ: it holds the labels of another corpus"
        )
    return labels
