"""The ledger: what was seen stays seen, what is unseen comes, whatever is appended, removed, reweighted or killed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.ledger.changes import (
    add,
    apply_pending,
    cancel,
    released,
    remove,
    reweight,
    set_mixture,
    synced,
)
from steel_megatron.data.ledger.history import History
from steel_megatron.data.ledger.ledger import dumps, loads
from steel_megatron.data.ledger.loader import micro_batches
from steel_megatron.data.ledger.records import DroppedDocuments, StepSize, in_words, samples_in
from steel_megatron.data.ledger.sync import RunPosition, defer, resume, start
from steel_megatron.errors import DataError
from tests.data.ledgers import LENGTH, corpus, ledger_of, located, two

# ---- random histories ----


@dataclasses.dataclass
class Run:
    """A run that syncs, is killed, changed and resumed, and a plain record of what it read."""

    ledger: History
    """As the file has it."""
    own: History
    """As the run reads by it."""
    consumed: int = 0
    seen: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """The samples consumed so far on this line of history."""
    saved: dict[int, str] = dataclasses.field(default_factory=dict)
    """Fingerprints of the checkpoints by their samples."""

    def train(self, ranks: int, accumulation: int) -> None:
        """To where the run syncs next, in whole batches, each process by a ledger of its own."""
        end, size = int(min(self.own.next_sync_sample, self.own.schedule.capacity())), ranks * accumulation
        ledgers = [loads(dumps(self.own), "memory") for _ in range(ranks)]
        while self.consumed + size <= end:
            shares = [micro_batches(self.consumed, size, 1, rank, ranks) for rank in range(ranks)]
            for micro in zip(*shares, strict=True):
                for own, numbers in zip(ledgers, micro, strict=True):
                    self.seen += [tuple(own.schedule.locate(number)) for number in numbers]
            self.consumed += size

    def position(self, ahead: int) -> RunPosition:
        return RunPosition(self.consumed, self.consumed, self.consumed + ahead, 0, 1)

    def sync(self, ahead: int, refuse: bool) -> None:
        """Before a checkpoint, perhaps with changes that cannot be applied."""
        try:
            if refuse:
                raise DataError("a corpus cannot be opened")
            self.ledger = self.own = resume(self.ledger, self.own, self.position(ahead))
        except DataError:
            before = {in_words(event, self.ledger.corpora) for event in self.ledger.events}
            try:
                self.ledger = defer(self.ledger, self.own, self.position(ahead))
                assert before <= {in_words(event, self.ledger.corpora) for event in self.ledger.events}
            except DataError:
                self.ledger = self.own.then(
                    synced, self.consumed, self.consumed + ahead
                )  # what does not fit is set aside
            self.own = dataclasses.replace(self.own, next_sync_sample=self.ledger.next_sync_sample)
        self.saved[self.consumed] = self.own.fingerprint(self.consumed)

    def resume(self, checkpoint: int, ahead: int) -> None:
        """From a checkpoint at or before the place of the kill; what came after it is forgotten."""
        del self.seen[checkpoint:]
        self.consumed = checkpoint
        self.saved = {at: of for at, of in self.saved.items() if at <= checkpoint}
        self.ledger = self.own = start(self.ledger, self.position(ahead))

    def free(self) -> None:
        """The run was killed: what came after the last checkpoint is forgotten, and may be changed by commands."""
        self.consumed = max(self.saved)
        del self.seen[self.consumed :]
        self.ledger = self.ledger.then(released)

    def check(self) -> None:
        """What holds at every moment."""
        ledger = self.ledger
        assert located(ledger, 0, self.consumed) == self.seen  # replayed from the start, by the ledger as it is now
        for at, fingerprint in self.saved.items():
            assert ledger.fingerprint(at) == fingerprint
        own: list[list[int]] = [[] for _ in ledger.corpora]
        for number, epoch, sample in self.seen:
            assert 0 <= sample < ledger.samples(number)
            own[number].append(epoch * ledger.samples(number) + sample)
        for samples in own:  # each corpus comes in its own order: nothing twice, nothing left out
            assert samples == list(range(len(samples)))
        assert ledger.schedule.consumed(self.consumed).tolist() == [len(samples) for samples in own]
        assert loads(dumps(ledger), "memory") == ledger


EPOCHS = st.sampled_from([0.5, 1.0, 1.7, 2.5, 3])


def active_at_last(ledger: History) -> dict[str, float | None]:
    """Names and epochs of the corpora that are active at last, by a plain replay of the events."""
    pool: dict[str, float | None] = {}
    for event in sorted(ledger.events, key=lambda event: ledger.next_sync_sample if event.at is None else event.at):
        pool |= {ledger.corpora[added.corpus].name: added.epochs for added in event.add}
        pool |= event.epochs
        for name in event.remove:
            del pool[name]
    return pool


def changed(ledger: History, data: st.DataObject, endless: bool, mixtures: bool) -> History:
    """One change, at random, pending or planned; what the ledger refuses is no change."""
    epochs = st.one_of(EPOCHS, st.none()) if endless else EPOCHS
    names, domains = sorted(active_at_last(ledger)), sorted({entry.domain for entry in ledger.corpora})
    kind = data.draw(st.sampled_from(["add", "add", "remove", "reweight", "mixture", "cancel"]))
    weights = st.fixed_dictionaries({domain: st.sampled_from([0.0, 1.0, 2.5]) for domain in domains})
    at = data.draw(st.one_of(st.none(), st.integers(ledger.next_sync_sample - 2, ledger.next_sync_sample + 20)))
    try:
        if kind == "add":
            name, domain = f"c{data.draw(st.integers(2, 10**6))}", data.draw(st.sampled_from(["zh", "en"]))
            new = corpus(name, data.draw(st.integers(1, 12)), domain)
            if data.draw(st.booleans()):
                like = ledger.corpora[data.draw(st.integers(0, len(ledger.corpora) - 1))].content
                dropped = DroppedDocuments(new.content[::-1], 1, 5, (like,))
                new = dataclasses.replace(new, tokens=new.tokens + 5, dropped=dropped)
            return ledger.then(add, [new], data.draw(epochs), at)
        if kind == "remove" and len(names) > 1:
            return ledger.then(remove, [data.draw(st.sampled_from(names))], at)
        if kind == "reweight":
            return ledger.then(reweight, {data.draw(st.sampled_from(names)): data.draw(epochs)}, at)
        if kind == "mixture" and mixtures:
            return ledger.then(set_mixture, data.draw(st.one_of(st.none(), weights)), at)
        if kind == "cancel":
            return ledger.then(cancel, data.draw(st.sampled_from([event.at for event in ledger.events])))
    except DataError:
        pass
    return ledger


def resumed(run: Run, checkpoint: int, ahead: int) -> None:
    """Resume; what does not fit there, as a later change was made for another pool, is taken back."""
    try:
        run.ledger.then(apply_pending, checkpoint)
    except DataError:
        kept = tuple(event for event in run.ledger.events if event.at is not None)
        run.ledger = dataclasses.replace(run.ledger, events=kept)
    run.resume(checkpoint, ahead)


AHEAD = st.integers(0, 25)


@given(data=st.data(), endless=st.booleans(), mixtures=st.booleans())
@settings(max_examples=120, deadline=None)
def test_random_histories(data: st.DataObject, endless: bool, mixtures: bool) -> None:
    first = [corpus(f"c{n}", data.draw(st.integers(1, 12)), "zh" if n else "en") for n in range(2)]
    run = Run(ledger := ledger_of(*first), ledger)
    run.resume(0, data.draw(AHEAD))
    run.saved[0] = run.ledger.fingerprint(0)
    for _ in range(data.draw(st.integers(1, 6))):
        run.train(data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2)))
        run.check()
        killed = data.draw(st.booleans())
        if killed and data.draw(st.booleans()):
            run.free()
        for _ in range(data.draw(st.integers(0, 2))):
            run.ledger = changed(run.ledger, data, endless, mixtures)
            run.check()  # nothing alters what was read, not even between two syncs
        if killed:
            resumed(run, data.draw(st.sampled_from(sorted(run.saved))), data.draw(AHEAD))
        else:
            run.sync(data.draw(AHEAD), data.draw(st.integers(0, 3)) == 0)
        run.check()
    resumed(run, run.consumed, 10**6)
    if run.ledger.schedule.capacity() < math.inf and not any(
        isinstance(event.mixture, dict) for event in run.ledger.events
    ):
        # Nothing unseen is lost: in the end, what is in was read to the end of its epochs.
        run.train(1, 1)
        run.check()
        pool, reached = active_at_last(run.ledger), [event.at or 0 for event in run.ledger.events]
        if max(reached) <= run.consumed:
            for number, name in [(number, run.ledger.corpora[number].name) for number in run.ledger.used]:
                if name in pool:
                    limit = samples_in(pool[name] or 1, run.ledger.samples(number))
                    before = int(
                        run.ledger.schedule.consumed(max(reached))[number]
                    )  # more than that if it was lowered then
                    assert run.ledger.schedule.consumed(run.consumed)[number] == max(limit, before)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_epochs_are_counted_exactly(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    epochs = [data.draw(EPOCHS) for _ in sizes]
    ledger = History(LENGTH, data.draw(st.integers(0, 2**63 - 1)))
    for number, (size, often) in enumerate(zip(sizes, epochs, strict=True)):
        if samples_in(often, size):
            ledger = ledger.then(add, [corpus(f"c{number}", size)], often, at=0)
    times = Counter(
        (ledger.corpora[number].name, sample)
        for number, _, sample in located(ledger, 0, int(ledger.schedule.capacity()))
    )
    for number, (size, often) in enumerate(zip(sizes, epochs, strict=True)):
        whole, rest = divmod(samples_in(often, size), size)
        for sample in range(size):
            assert times[f"c{number}", sample] == whole + (sample < rest)


def test_epochs_are_the_decimal_numbers_that_were_written() -> None:
    assert [samples_in(epochs, 10) for epochs in (0.1, 0.3, 0.7, 2.5, 1, 0.05)] == [1, 3, 7, 25, 10, 0]
    # Products that fall just below the whole number in binary.
    assert [samples_in(epochs, 100) for epochs in (0.29, 0.57, 1.15)] == [29, 57, 115]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_order(ranks: int) -> None:
    ledger = ledger_of(corpus("a", 40), corpus("b", 60))
    shares = [micro_batches(16, 16, 2, rank, ranks) for rank in range(ranks)]
    read = [
        tuple(ledger.schedule.locate(number)) for step in zip(*shares, strict=True) for own in step for number in own
    ]
    assert read == located(ledger, 16, 32)


# ---- the parts ----


def test_the_order_is_the_same_for_ever() -> None:
    ledger = ledger_of(corpus("a", 5), corpus("b", 3)).then(add, [corpus("c", 4)], None, at=4)
    assert located(ledger, 0, 16) == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 0, 3),
        (2, 0, 0),
        (2, 0, 1),
        (1, 0, 1),
        (2, 0, 2),
        (0, 0, 4),
        (1, 0, 2),
        (2, 0, 3),
        (2, 1, 0),
        (2, 1, 1),
        (2, 1, 2),
        (2, 1, 3),
    ]
    assert ledger.fingerprint(16) == "fa74bfefc8acb53dc7d224611f5751ca6245759b14d8968e17557875b0f25f92"


def test_unseen_and_new_are_shuffled_together() -> None:
    ledger = ledger_of(corpus("a", 1000)).then(add, [corpus("b", 600)]).then(apply_pending, 400)
    numbers = np.array([number for number, *_ in located(ledger, 0, 1600)])
    assert not numbers[:400].any() and numbers[400:].sum() == 600
    for stretch in np.split(numbers[400:], 12):
        assert 48 <= stretch.sum() <= 52


def test_the_example_of_the_docs() -> None:
    ledger = ledger_of(corpus("zh", 6), epochs=2.0).then(add, [corpus("code", 4)])
    assert ledger.events[-1].at is None and ledger.schedule.capacity() == 12
    resumed_at_5 = ledger.then(apply_pending, 5)
    assert resumed_at_5.schedule.capacity() == 16
    rest = located(resumed_at_5, 5, 16)
    assert sorted(rest) == [(0, 0, 5), *((0, 1, n) for n in range(6)), *((1, 0, n) for n in range(4))]
    assert rest != sorted(rest)


def test_endless_corpora_come_in_rounds() -> None:
    ledger = ledger_of(corpus("web", 10), epochs=None).then(add, [corpus("book", 5)], 1.0, at=0)
    assert ledger.schedule.capacity() == math.inf
    assert Counter(number for number, *_ in located(ledger, 0, 15)) == {0: 10, 1: 5}
    assert located(ledger, 15, 1015) == [(0, 1 + n // 10, n % 10) for n in range(1000)]
    assert ledger.schedule.consumed(10**9).tolist() == [10**9 - 5, 5]
    assert tuple(ledger.schedule.locate(10**9)) == located(ledger, 10**9, 10**9 + 1)[0]
    # Each round is mixed in an order of its own.
    both = ledger_of(corpus("a", 20), corpus("b", 20), epochs=None)
    rounds = {tuple(number for number, *_ in located(both, begin, begin + 40)) for begin in range(0, 160, 40)}
    assert len(rounds) == 4 and all(sum(numbers) == 20 for numbers in rounds)
    # What comes in when an epoch is half read: the round is what is left of it.
    halfway = ledger_of(corpus("web", 10), epochs=None).then(add, [corpus("book", 5)]).then(apply_pending, 4)
    assert Counter(number for number, *_ in located(halfway, 4, 15)) == {0: 6, 1: 5}


def test_a_mixture_is_held_until_a_corpus_is_used_up() -> None:
    ledger = ledger_of(corpus("a", 300, "zh"), corpus("b", 100, "zh"), corpus("c", 1000, "en"))
    ledger = ledger.then(set_mixture, {"zh": 3, "en": 1}, at=0)
    assert ledger.schedule.capacity() == 533  # 400 of zh are three quarters of it
    corpora = np.array([number for number, *_ in located(ledger, 0, 533)])
    # Quotas are 299.8125, 99.9375 and 133.25: the two largest remainders are rounded up.
    assert np.bincount(corpora).tolist() == [300, 100, 133]
    for number, share in ((0, 9 / 16), (1, 3 / 16), (2, 1 / 4)):
        assert np.abs(np.cumsum(corpora == number) - share * np.arange(1, 534)).max() < 3
    with pytest.raises(DataError, match=r"has 533 samples, and 534 are needed: the mixture used up domain 'zh'"):
        ledger.schedule.locate(533)
    paused = ledger.then(set_mixture, {"zh": 0, "en": 1}).then(apply_pending, 533)
    assert {number for number, *_ in located(paused, 533, 1000)} == {2}
    used_up = ledger.then(set_mixture, {"zh": 1, "en": 0}).then(apply_pending, 533).then(set_mixture, None, at=600)
    with pytest.raises(DataError, match="has 533 samples before the change planned for sample 600"):
        used_up.schedule.locate(540)


def test_a_mixture_without_end_repeats_small_corpora() -> None:
    ledger = ledger_of(corpus("small", 10, "zh"), corpus("large", 1000, "en"), epochs=None)
    ledger = ledger.then(set_mixture, {"zh": 1, "en": 1}, at=0)
    assert ledger.schedule.capacity() == math.inf
    assert ledger.schedule.consumed(100_000).tolist() == pytest.approx([50_000, 50_000], abs=1)
    assert ledger.schedule.locate(10**14).epoch > 0  # beyond the first round


def test_a_curriculum_is_planned_and_an_append_comes_between() -> None:
    planned = ledger_of(corpus("a", 500, "zh"), corpus("b", 500, "en")).then(set_mixture, {"zh": 1, "en": 3}, at=600)
    grown = planned.then(add, [corpus("c", 200, "zh")]).then(apply_pending, 200)
    assert located(grown, 0, 200) == located(planned, 0, 200)
    assert located(grown, 200, 400) != located(planned, 200, 400)
    assert [event.at for event in grown.events] == [0, 600, 200]
    stage = Counter(grown.corpora[number].domain for number, *_ in located(grown, 600, 800))
    assert stage["zh"] == pytest.approx(50, abs=3)
    # A stage that the run has passed comes before what is pending until then.
    late = planned.then(add, [corpus("c", 200, "zh")]).then(apply_pending, 650)
    assert located(late, 0, 650) == located(planned, 0, 650)
    # Resumed from before a change, the change stays where it is, and can be taken back.
    again = grown.then(apply_pending, 100)
    assert located(again, 0, 800) == located(grown, 0, 800)
    assert again.then(cancel, 200).schedule.locate_range(0, 500)[0].max() == 1


def test_removed_corpora_do_not_come_again() -> None:
    ledger = ledger_of(corpus("a", 100), corpus("b", 100)).then(remove, ["a"]).then(apply_pending, 50)
    assert 0 in {number for number, *_ in located(ledger, 0, 50)}
    assert {number for number, *_ in located(ledger, 50, int(ledger.schedule.capacity()))} == {1}
    assert ledger.schedule.consumed(int(ledger.schedule.capacity()))[1] == 100
    assert ledger.in_use() == [1]
    with pytest.raises(DataError, match="is in the ledger already, as a "):
        ledger.then(add, [corpus("a", 100)])


def test_a_paused_domain_may_lose_its_last_corpus() -> None:
    ledger = two().then(set_mixture, {"zh": 1, "en": 0}, at=0).then(remove, ["b"]).then(apply_pending, 10)
    assert ledger.schedule.capacity() == 100


def test_lower_epochs_end_a_corpus_that_was_read_so_far() -> None:
    ledger = ledger_of(corpus("a", 100), corpus("b", 100), epochs=3)
    lowered = ledger.then(reweight, {"a": 0.1}).then(apply_pending, 300)
    assert lowered.schedule.capacity() == 300 + 300 - int(lowered.schedule.consumed(300)[1])
    raised = lowered.then(reweight, {"a": 3}).then(apply_pending, 400)
    assert raised.schedule.consumed(int(raised.schedule.capacity())).tolist() == [300, 300]


def test_a_cancelled_corpus_can_come_in_later() -> None:
    ledger = ledger_of(corpus("a", 10)).then(add, [corpus("b", 10)]).then(cancel)
    assert ledger.events == ledger_of(corpus("a", 10)).events and ledger.schedule.capacity() == 10
    again = ledger.then(add, [corpus("b", 10, domain="other")], 2.0).then(apply_pending, 10)
    assert again.schedule.capacity() == 30 and [entry.domain for entry in again.known()] == ["text", "other"]


def test_fingerprints_say_what_decided_the_past() -> None:
    ledger = two()
    base = ledger.fingerprint(50)
    later = ledger.then(remove, ["b"], at=50).then(set_mixture, {"zh": 1.0}, at=60)
    assert later.fingerprint(50) == base != later.fingerprint(51)
    moved = dataclasses.replace(ledger.corpora[0], prefix="/elsewhere/a", name="renamed")
    assert dataclasses.replace(ledger, corpora=(moved, ledger.corpora[1])).fingerprint(50) == base
    dropped = dataclasses.replace(ledger.corpora[0], dropped=DroppedDocuments("0" * 64, 1, 1))
    others = [
        dataclasses.replace(ledger, seed=1),
        dataclasses.replace(ledger, sequence_length=4),
        dataclasses.replace(ledger, corpora=(dropped, ledger.corpora[1])),
        ledger_of(corpus("b", 100, "en"), corpus("a", 100, "zh")),
        ledger_of(corpus("a", 100, "zh"), corpus("b", 100, "zh")),
        ledger_of(corpus("a", 101, "zh"), corpus("b", 100, "en")),
        ledger_of(corpus("a", 100, "zh"), corpus("x", 100, "en")),
        ledger_of(*ledger.corpora, epochs=1.5),
        ledger.then(set_mixture, {"zh": 1.0, "en": 1.0}, at=49),
        ledger.then(set_mixture, {"zh": 1.0, "en": 2.0}, at=49),
        ledger.then(remove, ["b"], at=49),
        ledger.then(remove, ["a"], at=49),
        ledger.then(remove, ["a"], at=48),
        ledger.then(reweight, {"b": 2}, at=49),
        ledger.then(reweight, {"a": 2}, at=49),
        ledger.then(reweight, {"a": None}, at=49),
    ]
    assert (
        dataclasses.replace(ledger, last_synced_sample=9, next_sync_sample=20, steps=(StepSize(0, 0, 4),)).fingerprint(
            50
        )
        == base
    )
    assert len({base, *(other.fingerprint(50) for other in others)}) == 1 + len(others)


def test_a_ledger_of_256_corpora_and_1e8_samples() -> None:
    corpora = [corpus(f"c{n}", 300_000 + 1000 * n, f"d{n % 7}") for n in range(256)]
    ledger = ledger_of(*corpora).then(set_mixture, {f"d{n}": n + 1 for n in range(7)}, at=10**7)
    end = 3 * 10**7
    assert int(ledger.schedule.consumed(end).sum()) == end
    assert [tuple(ledger.schedule.locate(position)) for position in range(end, end + 50)] == located(
        ledger, end, end + 50
    )


# ---- what is refused ----
