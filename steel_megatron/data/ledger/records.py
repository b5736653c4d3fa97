"""What a ledger's JSON holds, as frozen dataclasses, read strictly: what is missing, unknown or wrong is named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from steel_megatron.errors import DataError

MOST_SAMPLES = 2**40
"""The most samples that a corpus is read for, over all its epochs."""
MOST_POSITIONS = 2**62
"""The most samples that a run may read, and a bound of all other counts: they fit an int64 with room to add."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Dropped:
    """Documents of a corpus that are left out, as others have them; their bits are in a file beside the ledger."""

    sha256: str
    """Of the file, which is named by it."""
    documents: int
    tokens: int
    like: tuple[str, ...] = ()
    """Content of the corpora that are to be read for them; empty where an older version did not say."""

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
    """SHA-256 that identifies tokens and documents, see :func:`~steel_megatron.data.indexed.dataset.content_hash`."""
    domain: str
    """By which mixtures call it, together with others."""
    documents: int
    """Of the files, with the dropped ones."""
    tokens: int
    """Of the files, with the dropped ones."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None where nobody recorded it."""
    dropped: Dropped | None = None
    max_id: int | None = None
    """The largest token id of a corpus without a manifest; None where the manifest says it, or nobody looked."""

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


@dataclass(frozen=True)
class StepSize:
    """From an optimizer step on, how many samples a step takes."""

    step: int
    """Steps done before."""
    consumed: int
    """Samples consumed before."""
    global_batch_size: int


class Fields:
    """A JSON object that is read field by field; whatever is wrong is a DataError that names the field.

    Args:
        value: what the JSON holds there.
        where: file and place, for the messages.
        known: names of all fields that may be there.
    """

    def __init__(self, value: object, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where} is {shown(value)}; it must be an object with {', '.join(known)}")
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise DataError(f"{where} has an unknown field {unknown[0]!r}; it may have {', '.join(known)}")
        self._value, self._where = value, where

    def get(self, name: str, right: str, check: Callable[[Any], bool], *default: Any) -> Any:
        """A field's value.

        Args:
            name: the field.
            right: what it must be, for messages.
            check: whether a value is right.
            default: the value if the field is missing; without one it must be there.

        Raises:
            DataError: the field is missing or wrong.
        """
        if name not in self._value:
            if default:
                return default[0]
            raise DataError(f"{self._where} has no field {name!r}; it must be {right}")
        if not check(self._value[name]):
            raise DataError(f"{self._where}: {name} is {shown(self._value[name])}; it must be {right}")
        return self._value[name]

    def text(self, name: str) -> str:
        """A text that is not empty."""
        return str(self.get(name, "a text", is_name))

    def count(self, name: str, least: int = 0, most: int = MOST_POSITIONS) -> int:
        """A field's value that is a whole number.

        Args:
            name: the field.
            least: its smallest allowed value.
            most: its largest allowed value.

        Raises:
            DataError: the field is missing or wrong.
        """
        return int(self.get(name, f"a whole number from {least} to {most}", lambda v: is_count(v, least, most)))

    def digest(self, name: str) -> str:
        """A SHA-256."""
        return str(self.get(name, "64 hex digits", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v))))


def shown(value: object) -> str:
    """The beginning of a value, for a message."""
    return repr(value)[:80]


def is_name(value: object) -> bool:
    """Whether a value can name a corpus or a domain."""
    return isinstance(value, str) and value.strip() != ""


def is_count(value: object, least: int, most: int) -> bool:
    """Whether a value is a whole number in a range.

    Args:
        value: the value; a bool is not a whole number.
        least: the smallest number of the range.
        most: the largest number of the range.
    """
    return type(value) is int and least <= value <= most


def is_epochs(value: object) -> bool:
    """Whether a value is a number of epochs."""
    return value is None or (_is_number(value) and value > 0)  # type: ignore[operator]


def _is_number(value: object) -> bool:
    """Whether a value is a number that is not out of all proportion: neither infinite nor of 400 digits."""
    return type(value) in (int, float) and -MOST_POSITIONS <= value <= MOST_POSITIONS  # type: ignore[operator]


def is_mixture(value: object) -> bool:
    """Whether a value is a mixture: weights by domain, at least one of them above 0."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(is_name, value)):
        return False
    weights = list(value.values())
    return all(_is_number(weight) and weight >= 0 for weight in weights) and any(weights)


EPOCHS = f"a number above 0, or null for without end (at most {MOST_POSITIONS:.0e})"
MIXTURE = f"weights by domain, from 0 on (at most {MOST_POSITIONS:.0e}) and at least one above 0, or null for none"


def corpus_from(value: object, where: str) -> Corpus:
    """A corpus out of the ledger's JSON."""
    known = ("name", "prefix", "content", "domain", "documents", "tokens", "tokenizer", "dropped", "max_id")
    fields = Fields(value, where, known)
    tokenizer = fields.get("tokenizer", "a text or null", lambda v: v is None or is_name(v), None)
    dropped = fields.get("dropped", "an object or null", lambda v: v is None or isinstance(v, dict), None)
    if dropped is not None:
        inner = Fields(dropped, f"{where}, dropped", ("sha256", "documents", "tokens", "like"))
        like = inner.get("like", "a list of contents", lambda v: isinstance(v, list) and all(map(is_name, v)), [])
        dropped = Dropped(inner.digest("sha256"), inner.count("documents", 1), inner.count("tokens", 1), tuple(like))
    documents, tokens = fields.count("documents", 1), fields.count("tokens", 1)
    if dropped is not None and (dropped.documents > documents or dropped.tokens > tokens):
        raise DataError(f"{where} drops {dropped} of its {documents} documents with {tokens} tokens")
    names = fields.text("name"), fields.text("prefix"), fields.digest("content"), fields.text("domain")
    max_id = fields.get("max_id", "a token id or null", lambda v: v is None or is_count(v, 0, MOST_POSITIONS), None)
    return Corpus(*names, documents, tokens, tokenizer, dropped, max_id)


def event_from(value: object, where: str, corpora: int) -> Event:
    """An event out of the ledger's JSON.

    Args:
        value: what the JSON holds there.
        where: file and place, for messages.
        corpora: how many corpora the ledger has.

    Raises:
        DataError: a field is missing, unknown or wrong; the message names it.
    """
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
    values["dropped"] = {**vars(corpus.dropped), "like": list(corpus.dropped.like)} if corpus.dropped else None
    if corpus.max_id is None:
        del values["max_id"]
    return values


def steps_from(value: object, where: str) -> tuple[StepSize, ...]:
    """The sizes of steps out of the ledger's JSON."""
    if not isinstance(value, list):
        raise DataError(f"{where} is {shown(value)}; it must be a list")
    found: list[StepSize] = []
    for number, entry in enumerate(value):
        fields = Fields(entry, f"{where}[{number}]", ("step", "consumed", "global_batch_size"))
        least = (found[-1].step + 1, found[-1].consumed + 1) if found else (0, 0)
        counts = fields.count("step", least[0]), fields.count("consumed", least[1])
        found.append(StepSize(*counts, fields.count("global_batch_size", 1)))
    return tuple(found)


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


def in_words(event: Event, corpora: Sequence[Corpus]) -> str:
    """What an event changes."""
    said = [f"add {corpora[added.corpus].name} ({_times(added.epochs)})" for added in event.add]
    said += [f"remove {name}" for name in event.remove]
    said += [f"read {name} {_times(epochs)}" for name, epochs in event.epochs.items()]
    if event.sets_mixture:
        weights = " ".join(f"{domain}={weight:g}" for domain, weight in (event.mixture or {}).items())
        said.append(f"mixture {weights or 'none'}")
    return "; ".join(said)


def _times(epochs: float | None) -> str:
    return "without end" if epochs is None else f"{epochs:g} times"
