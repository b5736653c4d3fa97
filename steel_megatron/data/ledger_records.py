"""What a ledger's JSON holds, as frozen dataclasses, read strictly: what is missing, unknown or wrong is named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from steel_megatron.errors import DataError

MOST_SAMPLES = 2**40
"""The most samples that a corpus is read for, over all its epochs."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Dropped:
    """Documents of a corpus that are left out, as others have them; their bits are in a file beside the ledger."""

    sha256: str
    """Of the file, which is named by it."""
    documents: int
    tokens: int

    @property
    def file_name(self) -> str:
        """The file's name."""
        return f"dropped-{self.sha256[:32]}.npy"


@dataclass(frozen=True)
class Corpus:
    """A corpus as it was when it came into the ledger."""

    name: str
    """By which commands call it."""
    prefix: str
    """Path without a suffix; relative ones start at the ledger's folder. It may be changed when a corpus moves."""
    content: str
    """SHA-256 that identifies tokens and documents, see :func:`~steel_megatron.data.indexed.content_hash`."""
    domain: str
    """By which mixtures call it, together with others."""
    documents: int
    """Of the files, with the dropped ones."""
    tokens: int
    """Of the files, with the dropped ones."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None where nobody recorded it."""
    dropped: Dropped | None = None

    def samples(self, sequence_length: int) -> int:
        """Whole samples in one epoch."""
        return max(0, (self.tokens - (self.dropped.tokens if self.dropped else 0) - 1) // sequence_length)

    @property
    def identity(self) -> list[Any]:
        """What its samples depend on."""
        return [self.content, self.dropped.sha256 if self.dropped else None]


def samples_in(epochs: float, samples: int) -> int:
    """The samples of so many epochs, rounded down; of the decimal number as it is written, so 0.3 of 10 are 3."""
    return math.floor(Fraction(repr(epochs)) * samples)


@dataclass(frozen=True)
class Added:
    """A corpus comes into the pool."""

    corpus: int
    """Its number among the ledger's corpora."""
    epochs: float | None = 1.0
    """How often it is read in the whole run; None for without end."""


@dataclass(frozen=True)
class Event:
    """A change of the pool from a sample on."""

    at: int | None
    """The first sample that it concerns; None until a run starts or resumes, and so decides."""
    add: tuple[Added, ...] = ()
    remove: tuple[str, ...] = ()
    """Names of corpora that leave the pool, for good."""
    epochs: Mapping[str, float | None] = field(default_factory=dict)
    """New numbers of epochs, by name."""
    mixture: Mapping[str, float] | None = None
    """Weights by domain; None for no mixture."""
    sets_mixture: bool = False
    """Whether the event says anything about the mixture; if not, the one before it stays."""


class Fields:
    """A JSON object that is read field by field; whatever is wrong is a DataError that names the field.

    Args:
        value: what the JSON holds there.
        where: file and place, for the messages.
        known: names of all fields that may be there.
    """

    def __init__(self, value: object, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where} is {_shown(value)}; it must be an object with {', '.join(known)}")
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise DataError(f"{where} has an unknown field {unknown[0]!r}; it may have {', '.join(known)}")
        self._value, self._where = value, where

    def get(self, name: str, right: str, check: Callable[[Any], bool], *default: Any) -> Any:
        """A field that passes ``check``; ``right`` says what would. Without a default the field must be there."""
        if name not in self._value:
            if default:
                return default[0]
            raise DataError(f"{self._where} has no field {name!r}; it must be {right}")
        if not check(self._value[name]):
            raise DataError(f"{self._where}: {name} is {_shown(self._value[name])}; it must be {right}")
        return self._value[name]

    def text(self, name: str) -> str:
        """A text that is not empty."""
        return str(self.get(name, "a text", is_name))

    def count(self, name: str, least: int = 0, most: int = 2**62) -> int:
        """A whole number."""
        return int(self.get(name, f"a whole number from {least} to {most}", lambda v: is_count(v, least, most)))

    def digest(self, name: str) -> str:
        """A SHA-256."""
        return str(self.get(name, "64 hex digits", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v))))


def _shown(value: object) -> str:
    return repr(value)[:80]


def is_name(value: object) -> bool:
    """Whether a value can name a corpus or a domain."""
    return isinstance(value, str) and value.strip() != ""


def is_count(value: object, least: int, most: int) -> bool:
    """Whether a value is a whole number in a range."""
    return type(value) is int and least <= value <= most


def is_epochs(value: object) -> bool:
    """Whether a value is a number of epochs."""
    return value is None or (type(value) in (int, float) and math.isfinite(value) and value > 0)  # type: ignore[arg-type,operator]


def is_mixture(value: object) -> bool:
    """Whether a value is a mixture: weights by domain, at least one of them above 0."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(is_name, value)):
        return False
    weights = list(value.values())
    sane = all(type(weight) in (int, float) and math.isfinite(weight) and weight >= 0 for weight in weights)
    return sane and any(weights)


EPOCHS = "a number above 0, or null for without end"
MIXTURE = "weights by domain, from 0 on and at least one above 0, or null for no mixture"


def corpus_from(value: object, where: str) -> Corpus:
    """A corpus out of the ledger's JSON."""
    known = ("name", "prefix", "content", "domain", "documents", "tokens", "tokenizer", "dropped")
    fields = Fields(value, where, known)
    tokenizer = fields.get("tokenizer", "a text or null", lambda v: v is None or is_name(v), None)
    dropped = fields.get("dropped", "an object or null", lambda v: v is None or isinstance(v, dict), None)
    if dropped is not None:
        inner = Fields(dropped, f"{where}, dropped", ("sha256", "documents", "tokens"))
        dropped = Dropped(inner.digest("sha256"), inner.count("documents", 1), inner.count("tokens", 1))
    documents, tokens = fields.count("documents", 1), fields.count("tokens", 1)
    if dropped is not None and (dropped.documents > documents or dropped.tokens > tokens):
        raise DataError(f"{where} drops {dropped} of its {documents} documents with {tokens} tokens")
    names = fields.text("name"), fields.text("prefix"), fields.digest("content"), fields.text("domain")
    return Corpus(*names, documents, tokens, tokenizer, dropped)


def event_from(value: object, where: str, corpora: int) -> Event:
    """An event out of the ledger's JSON, in which there are ``corpora`` corpora."""
    fields = Fields(value, where, ("at", "add", "remove", "epochs", "mixture"))
    at = fields.get("at", "a sample's number, or null", lambda v: v is None or is_count(v, 0, MOST_SAMPLES))
    add = []
    for number, entry in enumerate(fields.get("add", "a list", lambda v: isinstance(v, list), [])):
        inner = Fields(entry, f"{where}, add[{number}]", ("corpus", "epochs"))
        add.append(Added(inner.count("corpus", 0, corpora - 1), inner.get("epochs", EPOCHS, is_epochs)))
    names = fields.get("remove", "a list of names", lambda v: isinstance(v, list) and all(map(is_name, v)), [])
    epochs = fields.get(
        "epochs", f"by name, {EPOCHS}", lambda v: isinstance(v, dict) and all(map(is_epochs, v.values())), {}
    )
    mixture = fields.get("mixture", MIXTURE, is_mixture, None)
    return Event(at, tuple(add), tuple(names), epochs, mixture, "mixture" in value)  # type: ignore[operator]


def corpus_to(corpus: Corpus) -> dict[str, Any]:
    """A corpus as the ledger's JSON has it."""
    values = dict(vars(corpus))
    values["dropped"] = dict(vars(corpus.dropped)) if corpus.dropped else None
    return values


def event_to(event: Event) -> dict[str, Any]:
    """An event as the ledger's JSON has it; only what it changes."""
    values: dict[str, Any] = {"at": event.at}
    if event.add:
        values["add"] = [dict(vars(added)) for added in event.add]
    if event.remove:
        values["remove"] = list(event.remove)
    if event.epochs:
        values["epochs"] = dict(event.epochs)
    if event.sets_mixture:
        values["mixture"] = None if event.mixture is None else dict(event.mixture)
    return values
