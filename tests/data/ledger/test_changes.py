"""Changes of a ledger: their effect, what they forget, what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from steel_megatron.data.ledger.changes import (
    add,
    apply_pending,
    at_step,
    cancel,
    lost,
    read_again,
    released,
    remove,
    reweight,
    set_mixture,
    skip,
)
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import dumps, loads
from steel_megatron.data.ledger.records import DroppedDocuments, StepSize
from steel_megatron.data.ledger.sync import RunPosition, defer, first_difference
from steel_megatron.errors import DataError
from tests.data.ledgers import LENGTH, corpus, ledger_of, located, two


def test_what_was_not_read_is_released_by_a_stop() -> None:
    running = two().then(apply_pending, 50, 70)
    assert running.then(add, [corpus("c", 9)]).events[-1].at is None
    planned = running.then(add, [corpus("c", 9)], at=70)
    assert planned.then(cancel, 70).events == running.events
    assert running.then(released).then(remove, ["a"], at=50).then(cancel, 50) == running.then(released) != running
    taken = (
        running.then(released).then(remove, ["a"]).then(apply_pending, 50)
    )  # a run took it in, and was killed before its checkpoint
    assert taken.fingerprint(50) == running.fingerprint(50) and taken.then(cancel, 50) == running.then(released)


def test_what_fits_only_at_the_next_sync_can_be_cancelled_after_a_kill() -> None:
    planned = two().then(set_mixture, {"zh": 1, "en": 1}, at=55).then(set_mixture, {"zh": 1, "en": 0}, at=65)
    running = planned.then(apply_pending, 50, 70)
    pending = running.then(remove, ["b"])  # which the mixture of 55 still needs
    assert pending.then(released) == pending
    assert pending.then(released).then(cancel).then(released) == running.then(released)


def test_a_plan_may_need_what_is_pending() -> None:
    ledger = (
        two()
        .then(apply_pending, 20, 40)
        .then(add, [corpus("c", 50, "code")])
        .then(set_mixture, {"zh": 1, "en": 1, "code": 2}, at=60)
    )
    ledger = ledger.then(set_mixture, {"zh": 1, "en": 1, "code": 0}, at=90).then(remove, ["c"], at=90)
    assert located(ledger, 0, 40) == located(two(), 0, 40) and ledger.in_use() == [0, 1, 2]
    stages = np.array([number for number, *_ in located(ledger.then(apply_pending, 40), 0, 120)])
    assert [2 in stages[begin:end] for begin, end in ((0, 40), (40, 60), (60, 90), (90, 120))] == [
        False,
        True,
        True,
        False,
    ]


def test_steps_may_take_other_numbers_of_samples() -> None:
    assert two().step_samples(1) is None
    ledger = two().then(at_step, 0, 0, 8).then(at_step, 4, 32, 8)
    assert ledger.steps == (StepSize(0, 0, 8),) and ledger.step_samples(6) == range(40, 48)
    ledger = ledger.then(at_step, 6, 48, 4).then(at_step, 9, 60, 16)
    assert [ledger.step_samples(step) for step in (6, 7, 9, 10)] == [
        *(range(40, 48), range(48, 52), range(56, 60), range(60, 76)),
    ]
    assert ledger.then(at_step, 6, 48, 8).steps == (StepSize(0, 0, 8),)  # an older checkpoint: later steps come again
    assert ledger.then(at_step, 7, 52, 4).steps == ledger.steps[:2]
    assert ledger.then(at_step, 0, 0, 2).steps == (StepSize(0, 0, 2),)
    old = two().then(at_step, 10, 80, 8)  # resumed by the first version that writes it down
    assert old.step_samples(10) is None and old.step_samples(11) == range(80, 88)


def test_what_was_cancelled_is_forgotten() -> None:
    ledger = ledger_of(dataclasses.replace(corpus("a", 100), tokenizer="qwen"))
    other = dataclasses.replace(corpus("b", 10), tokenizer=None)
    again = (
        ledger.then(add, [other])
        .then(cancel)
        .then(add, [dataclasses.replace(corpus("x", 20), name="b", tokenizer="qwen")])
    )
    assert [entry.content for entry in again.known()] == [corpus(name, 1).content for name in "ax"]
    # In the middle: others keep their numbers, and so their order.
    three = ledger.then(add, [corpus("b", 10)], at=20).then(add, [corpus("c", 30)], at=40)
    two_left = three.then(cancel, 20)
    assert two_left.number_of("c") == 2 and two_left.used == {0, 2}
    with pytest.raises(DataError, match="the ledger has no corpus 'b'; it has a, c"):
        two_left.then(remove, ["b"])
    filled = two_left.then(add, [dataclasses.replace(corpus("y", 10), name="b", tokenizer="qwen")], at=60)
    assert [entry.name for entry in filled.known()] == ["a", "c", "b"] and filled.number_of("c") == 2
    assert located(filled, 0, 60) == located(two_left, 0, 60)
    assert loads(dumps(two_left), "memory") == two_left


def kept_and_dropped(**options: int | None) -> History:
    """100 samples of a, and of b, of which a document was dropped that a has."""
    like = DroppedDocuments("0" * 64, 1, 5, (corpus("a", 1).content,))
    return (
        ledger_of(corpus("base", 50))
        .then(add, [corpus("a", 100)], **options)
        .then(add, [dataclasses.replace(corpus("b", 100), dropped=like)], at=60)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda: kept_and_dropped(at=40).then(cancel, 40),
        lambda: kept_and_dropped(at=40).then(remove, ["a"], at=70),
        lambda: kept_and_dropped(at=40).then(apply_pending, 61).then(remove, ["a"]),
        lambda: kept_and_dropped(at=40).then(reweight, {"a": 0.5}, at=70),
        lambda: kept_and_dropped(epochs=0.5, at=40),
    ],
)
def test_documents_that_were_dropped_are_not_lost(change: Callable[[], History]) -> None:
    with pytest.raises(
        DataError, match=r"documents of b were dropped because a.* so they would be lost; keep it for one epoch"
    ):
        change()


def test_what_is_read_once_or_not_needed_may_go() -> None:
    ledger = kept_and_dropped(at=40)
    ledger.then(remove, ["a", "b"], at=70)
    ledger.then(cancel, 60).then(cancel, 40)
    ledger.then(reweight, {"a": 1.5}, at=70)
    read = ledger.then(apply_pending, 249)
    assert lost(read.then(remove, ["a"]).then(reweight, {"b": 2})) == set()
    assert lost(ledger.then(remove, ["a"], at=249)) == set()
    assert lost(read.then(reweight, {"a": 0.5})) == set()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: two().then(add, [corpus("a", 100)]),
            r"/data/a is in the ledger already, as a .*data append skip it \(--on_duplicate skip\)",
        ),
        (lambda: two().then(add, [corpus("c", 9), corpus("c", 9)]), "is in the ledger already, as c "),
        (lambda: two().then(add, [dataclasses.replace(corpus("c", 9), name="a")]), r"corpus a .* has the name a of a "),
        (
            lambda: two().then(add, [corpus("c", 0)]),
            r"/data/c: 1 tokens make no sample of sequence_length \+ 1 = 9 tokens",
        ),
        (lambda: two().then(add, [corpus("c", 9)], 0.0), "epochs is 0.0; it must be a number above 0, or null"),
        (lambda: two().then(add, [corpus("c", 9)], math.nan), "epochs is nan"),
        (lambda: two().then(add, [corpus("c", 2**20)], 2.0**30), "corpus 'c' has 1,048,576 samples .* lower epochs"),
        (lambda: two().then(add, [corpus("c", 9, "math")], mixture={"zh": 1.0}), "does not name domain 'en'"),
        (
            lambda: two().then(set_mixture, {"zh": 1, "en": 1}).then(add, [corpus("c", 9, "math")]),
            "does not name domain 'math'",
        ),
        (
            lambda: two().then(apply_pending, 50).then(add, [corpus("c", 9)], at=49),
            "sample 49 is too early for a change: the run.s last sync was at sample 50",
        ),
        (
            lambda: two().then(apply_pending, 50, 60).then(add, [corpus("c", 9)], at=59),
            "59 is too early for a change: a live run reads to sample 60 .*--at",
        ),
        (lambda: two().then(add, [corpus("c", 9)], at=2**41), "too late for a change: the latest is 1,099,511,627,776"),
        (lambda: two().then(add, [corpus("c", 9)], 10**400), "epochs is 1000.*at most 5e.18"),
        (lambda: two().then(set_mixture, {"zh": 10**400, "en": 1}), "the mixture is .*at most 5e.18"),
        (
            lambda: two().schedule.locate(10**19),
            "10,000,000,000,000,000,001 samples are needed; no run reads more than",
        ),
        (
            lambda: ledger_of(corpus("a", 9), epochs=None).schedule.consumed(2**63),
            "no run reads more than 4,611,686,018",
        ),
        (
            lambda: ledger_of(corpus("a", 9), epochs=None).schedule.locate_range(2**62, 2**62 + 1),
            "no run reads more than",
        ),
        (lambda: two().then(remove, ["c"]), "the ledger has no corpus 'c'; it has a, b"),
        (lambda: two().then(remove, ["a"], at=10).then(remove, ["a"], at=20), "'a' is not active at sample 20"),
        (
            lambda: two().then(set_mixture, {"zh": 1, "en": 1}, at=0).then(remove, ["b"]),
            "domain 'en' the weight 1, but no active corpus",
        ),
        (lambda: two().then(reweight, {"a": -1}), "epochs of a is -1"),
        (lambda: two().then(reweight, {"c": 1}), "the ledger has no corpus 'c'"),
        (lambda: two().then(set_mixture, {"zh": 1}), "does not name domain 'en' .of b.*0 to pause it"),
        (
            lambda: two().then(set_mixture, {"zh": 1, "en": 1, "fr": 1}),
            "domain 'fr' the weight 1, but no active",
        ),
        (lambda: two().then(set_mixture, {"zh": 0, "en": 0}), "the mixture is .* at least one above 0"),
        (lambda: two().then(set_mixture, {"zh": -1, "en": 2}), "the mixture is "),
        (lambda: two().then(set_mixture, {}), "the mixture is {}"),
        (lambda: two().then(cancel), "nothing is pending"),
        (lambda: two().then(cancel, 0), "nothing would be left in the ledger"),
        (lambda: two().then(cancel, 70), "nothing is planned for sample 70"),
        (
            lambda: two().then(remove, ["a"], at=20).then(apply_pending, 21).then(cancel, 20),
            "sample 20 stay: the run.s last sync was at sample 21",
        ),
        (
            lambda: two().then(remove, ["a"], at=20).then(apply_pending, 10, 21).then(cancel, 20),
            "20 stay: a live run reads to sample 21.*stop the run",
        ),
        (
            lambda: two().then(apply_pending, 201),
            "has 200 samples, and 201 are needed: every corpus is read .*a, b",
        ),
        (lambda: two().schedule.locate(200), "has 200 samples, and 201 are needed"),
        (lambda: two().schedule.locate_range(0, 201), "has 200 samples, and 201 are needed"),
        (
            lambda: two().schedule.require(999, "train_steps"),
            "has 200 samples, and 999 are needed by train_steps: every",
        ),
        (
            lambda: two().then(set_mixture, None, at=300).schedule.locate(250),
            "200 samples before the change planned for sample 300",
        ),
        (
            lambda: two().then(set_mixture, None, at=201).schedule.locate(200),
            "200 samples before the change planned for sample 201",
        ),
        (
            lambda: two().then(remove, ["a", "b"], at=20).schedule.locate(20),
            "has 20 samples, and 21 .*: no corpus is active",
        ),
        (lambda: History(LENGTH, 0).schedule.locate(0), "has 0 samples, and 1 are needed: no corpus is active"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrong()


def test_tokenizers_are_not_mixed() -> None:
    ledger = ledger_of(dataclasses.replace(corpus("a", 9), tokenizer="qwen"), corpus("megatron", 9))
    ledger.then(add, [dataclasses.replace(corpus("b", 9), tokenizer="qwen")])
    with pytest.raises(DataError, match="different tokenizers cannot be mixed: qwen of a, llama of c"):
        ledger.then(add, [dataclasses.replace(corpus("c", 9), tokenizer="llama")])


def test_duplicates_are_skipped_where_that_is_wished(caplog: pytest.LogCaptureFixture) -> None:
    same = dataclasses.replace(corpus("a", 100, "zh"), name="again", prefix="/data/again")
    assert two().then(add, [same], on_duplicate="skip") == two()
    assert "/data/again is in the ledger already, as a (/data/a): the same bytes; skipped" in caplog.text
    grown = two().then(add, [same, corpus("c", 9)], on_duplicate="skip", at=10)
    assert [entry.name for entry in grown.corpora] == ["a", "b", "c"]


def test_skipped_samples_are_parts_of_the_past_once_they_were_passed() -> None:
    plain = two()
    skips = plain.then(skip, 10, 20).then(skip, 30, 40).then(skip, 20, 25).then(skip, 33, 35)
    assert [(part.first, part.end) for part in skips.skipped] == [(10, 25), (30, 40)]
    assert [number for number in range(50) if skips.skips(number)] == [*range(10, 25), *range(30, 40)]
    assert located(skips, 0, 60) == located(plain, 0, 60)  # they keep their places
    assert loads(dumps(skips), "l.json") == skips and '"skipped"' not in dumps(plain)
    # Whatever is skipped later does not change the past, and is a difference that names both.
    assert skips.fingerprint(10) == plain.fingerprint(10) and skips.fingerprint(11) != plain.fingerprint(11)
    assert skips.fingerprint(12) != plain.then(skip, 10, 11).fingerprint(12)
    assert skips.fingerprint(30) == plain.then(skip, 10, 25).fingerprint(30) and skips.differs_from(plain)
    assert first_difference(skips, plain, 10) is None
    assert first_difference(skips, plain, 12) == ("it skips the samples 10:12, where none were skipped", None)
    assert skips.then(read_again, 12, 35).skipped == plain.then(skip, 10, 12).then(skip, 35, 40).skipped
    assert skips.then(read_again, 0, 100) == plain
    read = skips.then(apply_pending, 15, 20)
    assert read.skipped == skips.skipped
    for change, first, end, wrong in (
        (skip, 19, 30, "sample 19 is too early for a change: a live run reads to sample 20"),
        (read_again, 19, 30, "sample 19 is too early"),
        (skip, 30, 30, "samples 30:30 are none; they must be A:B"),
        (skip, 30, 2**50, "must be A:B with 0 <= A < B <="),
        (read_again, 50, 60, "none of the samples 50 to 59 is skipped"),
    ):
        with pytest.raises(DataError, match=re.escape(wrong)):
            read.then(change, first, end)


def test_samples_that_are_skipped_too_late_are_read(caplog: pytest.LogCaptureFixture) -> None:
    """Where a file system does not show the run's lock, a change may come for samples that the run reads already."""
    own = two().then(skip, 12, 14).then(apply_pending, 10, 20)
    late = own.then(released).then(skip, 15, 30).then(remove, ["b"], at=40)
    position = RunPosition(step=2, consumed=10, next_sync=20, end=60, global_batch_size=5)
    kept = late.then(defer, own, position)
    assert [(part.first, part.end) for part in kept.skipped] == [(12, 14), (20, 30)]
    assert kept.fingerprint(20) == own.fingerprint(20) and [event.at for event in kept.events] == [0, 40]
    assert "samples 12:14, 15:20 were to be skipped, and 12:14 are" in caplog.text
