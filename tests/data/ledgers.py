"""Ledgers of corpora that nobody opens."""

from __future__ import annotations

from steel_megatron.data.ledger.changes import add, remove, reweight, set_mixture
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.records import Corpus, DroppedDocuments

LENGTH = 8


def corpus(name: str, samples: int, domain: str = "text") -> Corpus:
    """A corpus of so many samples; its content is its name."""
    return Corpus(name, f"/data/{name}", name.encode().hex().ljust(64, "0"), domain, 3, samples * LENGTH + 1)


def ledger_of(*corpora: Corpus, epochs: float | None = 1.0) -> History:
    """A ledger that begins with some corpora."""
    return History(LENGTH, 1234).then(add, corpora, epochs)


def two() -> History:
    """100 samples each of zh and en."""
    return ledger_of(corpus("a", 100, "zh"), corpus("b", 100, "en"))


def full() -> History:
    """A ledger with everything that its JSON can hold."""
    dropped = Corpus("c", "c", "c" * 64, "zh", 3, 9 * LENGTH, "qwen", DroppedDocuments("f" * 64, 1, 8))
    ledger = two().then(add, [dropped], None, at=40)
    ledger = ledger.then(reweight, {"a": 2.5, "b": None}, at=50).then(set_mixture, {"zh": 1, "en": 0.5}, at=60)
    return ledger.then(remove, ["c"], at=70).then(set_mixture, None, at=80).then(add, [corpus("d", 5, "zh")])


def located(ledger: History, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Corpus, epoch and number of each sample of a range."""
    return list(zip(*(column.tolist() for column in ledger.schedule.locate_range(begin, end)), strict=True))
