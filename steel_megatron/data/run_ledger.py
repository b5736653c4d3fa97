"""The ledger of a run: begun with its first corpora, held against its settings, and what one of its steps read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steel_megatron.data.indexed import Origin
from steel_megatron.data.ledger import Ledger
from steel_megatron.data.loader import LedgerSamples
from steel_megatron.errors import DataError


def names_of(prefixes: Sequence[str]) -> list[str]:
    """Names for corpora: the last parts of their paths, or the whole paths of those that would have the same."""
    counts = Counter(Path(prefix).name for prefix in prefixes)
    return [Path(prefix).name if counts[Path(prefix).name] == 1 else str(prefix) for prefix in prefixes]


def new_ledger(
    folder: Path,
    prefixes: Sequence[str],
    sequence_length: int,
    seed: int,
    names: Sequence[str] | None = None,
    domain: str = "default",
    epochs: float | None = None,
) -> Ledger:
    """A ledger that begins with some corpora.

    Args:
        folder: where it will be.
        prefixes: paths without a suffix; each once.
        sequence_length: tokens that a sample predicts.
        seed: of all orders.
        names: one for each; by default as :func:`names_of`.
        domain: of all of them.
        epochs: how often each is read; None for without end.

    Raises:
        DataError: a corpus cannot be used.
    """
    return Ledger(sequence_length, seed, folder=folder).append(prefixes, names or names_of(prefixes), domain, epochs)


def read_ledger(path: Path, sequence_length: int, beginning: Sequence[str]) -> Ledger | None:
    """A run's ledger; None if there is none yet.

    Args:
        path: where it is.
        sequence_length: of the model.
        beginning: the corpora that the run's settings name; empty for any.

    Raises:
        DataError: it is damaged, for other sequences, or does not read these corpora.
    """
    if not path.exists():
        return None
    ledger = Ledger.load(path)
    if ledger.sequence_length != sequence_length:
        raise DataError(
            f"{path} cuts samples of {ledger.sequence_length:,} tokens, but model.sequence_length is "
            f"{sequence_length:,}; take another checkpoint.directory or ledger"
        )
    if beginning:
        ledger.check_began_with(beginning)
    return ledger


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document in a sample."""

    corpus: str
    """Name of the corpus in the ledger."""
    document: int
    """Number of the document in its corpus."""
    origin: Origin | None
    """The file and row it came from; None where nobody recorded it."""
    offset: int
    """The document's token with which the part begins."""
    ids: tuple[int, ...]
    """The token ids of the part."""


def parts_of(samples: LedgerSamples, number: int) -> list[DocumentPart]:
    """The documents that a sample is made of, in order.

    Raises:
        DataError: the ledger has no such sample.
    """
    name = samples.ledger.corpora[samples.ledger.locate(number).corpus].name
    corpus, pieces = samples.documents(number)
    return [
        DocumentPart(
            name,
            piece.document,
            corpus.origin(piece.document),
            piece.offset,
            tuple(corpus.tokens_of(piece.document, piece.offset, piece.length).tolist()),
        )
        for piece in pieces
    ]
