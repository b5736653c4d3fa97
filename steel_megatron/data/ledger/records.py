"""The records of a ledger's JSON, see :mod:`~steel_megatron.data.strict_json`."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any

from steel_megatron.data.strict_json import MOST, REQUIRED, SHA256, Rule, list_of, or_null, whole
from steel_megatron.errors import DataError

MOST_SAMPLES = 2**40
"""The most samples that a corpus is read for, over all its epochs."""
MOST_POSITIONS = MOST
"""The most samples that a run may read."""


def _is_number(value: object) -> bool:
    """Whether a value is a number in a sane range: neither infinite nor of 400 digits."""
    return type(value) in (int, float) and -MOST_POSITIONS <= value <= MOST_POSITIONS  # type: ignore[operator]


def _is_mixture(value: object) -> bool:
    if not isinstance(value, dict) or not all(map(NAME.holds, value)):
        return value is None
    weights = list(value.values())
    return all(_is_number(weight) and weight >= 0 for weight in weights) and any(weights)


def _is_name(value: object) -> bool:
    """Whether a value is a text that UTF-8 can hold; Python gives bytes of a file name that are none as surrogates."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


NAME = Rule(_is_name, "a text that is not empty, in UTF-8")
EPOCHS = Rule(
    lambda value: value is None or (_is_number(value) and value > 0),
    f"a number above 0, or null for unlimited (at most {MOST_POSITIONS:.0e})",
)
EPOCHS_BY_NAME = Rule(
    lambda value: isinstance(value, dict) and all(map(EPOCHS.holds, value.values())), f"by name, {EPOCHS.right}"
)
MIXTURE = Rule(
    _is_mixture,
    f"weights by domain, each from 0 (at most {MOST_POSITIONS:.0e}) and at least one above 0, or null for none",
)


class Unchanged(enum.Enum):
    """In place of an event's mixture: the mixture before it stays."""

    MIXTURE = "as before"


@dataclass(frozen=True)
class DroppedDocuments:
    """Documents of a corpus that are left out, as others have them; their bits are in a file next to the ledger."""

    sha256: Annotated[str, SHA256]
    """Of the file, which is named after it."""
    documents: Annotated[int, whole(1)]
    tokens: Annotated[int, whole(1)]
    like: Annotated[tuple[str, ...], list_of(NAME, "a list of contents")] = ()
    """Content of the corpora that hold the remaining copies; empty in ledgers of versions that did not record it."""

    @property
    def file_name(self) -> str:
        """The file's name."""
        return f"dropped-{self.sha256[:32]}.npy"


@dataclass(frozen=True)
class Corpus:
    """A corpus as it was when it was added to the ledger.

    Raises:
        DataError: more is dropped than there is.
    """

    name: Annotated[str, NAME]
    """By which commands call it."""
    prefix: Annotated[str, NAME]
    """Path without a suffix; relative ones start at the ledger's folder. It may be changed when a corpus moves."""
    content: Annotated[str, SHA256]
    """SHA-256 that identifies tokens and documents, see :func:`~steel_megatron.data.indexed.dataset.content_hash`."""
    domain: Annotated[str, NAME]
    """By which mixtures call it, together with others."""
    documents: Annotated[int, whole(1)]
    """Of the files, with the dropped ones."""
    tokens: Annotated[int, whole(1)]
    """Of the files, with the dropped ones."""
    tokenizer: Annotated[str | None, or_null(NAME)] = None
    """Fingerprint of the tokenizer; None if not recorded."""
    dropped: DroppedDocuments | None = None
    max_id: Annotated[int | None, or_null(Rule(whole(0).holds, "a token id"))] = None
    """The largest token id of a corpus without a manifest; None where the manifest has it, or nobody looked."""
    labels: Annotated[str | None, or_null(SHA256)] = None
    """Content of the corpus of labels; None for a corpus without labels, all of whose tokens are predicted."""
    whole_samples: Annotated[int | None, or_null(whole(1))] = None
    """Samples of an epoch where documents stay whole, at the ledger's sequence length; None where they are cut."""

    def __post_init__(self) -> None:
        dropped = self.dropped
        if dropped is not None and (dropped.documents > self.documents or dropped.tokens > self.tokens):
            raise DataError(
                f"{dropped.documents:,} documents with {dropped.tokens:,} tokens are dropped, but there are only "
                f"{self.documents:,} documents with {self.tokens:,} tokens"
            )

    def samples(self, sequence_length: int) -> int:
        """Whole samples in one epoch."""
        if self.whole_samples is not None:
            return self.whole_samples
        return max(0, (self.tokens - (self.dropped.tokens if self.dropped else 0) - 1) // sequence_length)

    @property
    def identity(self) -> list[Any]:
        """What its samples depend on."""
        identity = [self.content, self.dropped.sha256 if self.dropped else None]
        return identity if self.labels is None else [*identity, self.labels]


def samples_in(epochs: float, samples: int) -> int:
    """The samples in a number of epochs, rounded down; in decimal arithmetic, so that 0.3 epochs of 10 are 3."""
    return math.floor(Fraction(repr(epochs)) * samples)


@dataclass(frozen=True)
class AddedCorpus:
    """A corpus becomes active."""

    corpus: Annotated[int, whole(0)]
    """Its number among the ledger's corpora."""
    epochs: Annotated[float | None, EPOCHS] = field(default=1.0, metadata=REQUIRED)
    """How often it is read in the whole run; None for unlimited."""


@dataclass(frozen=True)
class Event:
    """A change of the active corpora from a sample on."""

    at: Annotated[int | None, or_null(Rule(whole(0, MOST_SAMPLES).holds, "a sample's number"))]
    """The first sample that it concerns; None while it is pending."""
    add: tuple[AddedCorpus, ...] = ()
    remove: Annotated[tuple[str, ...], list_of(NAME, "a list of names")] = ()
    """Names of corpora that are not read any further, for good."""
    epochs: Annotated[Mapping[str, float | None], EPOCHS_BY_NAME] = field(default_factory=dict)
    """New numbers of epochs, by name."""
    mixture: Annotated[Mapping[str, float] | Unchanged | None, MIXTURE] = Unchanged.MIXTURE
    """Weights by domain; None for no mixture."""

    def start(self, if_pending: int) -> int:
        """The first sample that it concerns, or ``if_pending``."""
        return if_pending if self.at is None else self.at


@dataclass(frozen=True)
class StepSize:
    """From an optimizer step on, how many samples a step takes."""

    step: Annotated[int, whole(0)]
    """Steps done before."""
    consumed: Annotated[int, whole(0)]
    """Samples consumed before."""
    global_batch_size: Annotated[int, whole(1)]


@dataclass(frozen=True)
class SkippedSamples:
    """Samples that keep their places, but are not read: none of their labels counts."""

    first: Annotated[int, whole(0, MOST_SAMPLES)]
    end: Annotated[int, whole(1, MOST_SAMPLES)]
    """The one after the last."""


SHOWN = 8
"""Changes of corpora that are named."""


def in_words(event: Event, corpora: Sequence[Corpus]) -> str:
    """What an event changes; of many corpora the first ones and how many more there are."""
    words = [f"add {corpora[added.corpus].name} ({_times(added.epochs)})" for added in event.add]
    words += [f"remove {name}" for name in event.remove]
    words += [f"read {name} {_times(epochs)}" for name, epochs in event.epochs.items()]
    if len(words) > SHOWN:
        words[SHOWN:] = [f"and so for {len(words) - SHOWN:,} more"]
    if event.mixture is not Unchanged.MIXTURE:
        weights = " ".join(f"{domain}={weight:g}" for domain, weight in (event.mixture or {}).items())
        words.append(f"mixture {weights or 'none'}")
    return "; ".join(words)


def _times(epochs: float | None) -> str:
    return "without limit" if epochs is None else f"{epochs:g} times"
