"""The ledger: what was seen stays seen, what is unseen comes, whatever is appended, removed, reweighted or killed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.ledger import Ledger, dumps, loads
from steel_megatron.data.ledger_records import Dropped, samples_in
from steel_megatron.data.loader import micro_batches
from steel_megatron.errors import DataError
from tests.data.ledgers import LENGTH, corpus, ledger_of, located, two

# ---- random histories ----


@dataclasses.dataclass
class Run:
    """A run that is stopped, changed and resumed, and what a plain book of it says."""

    ledger: Ledger
    consumed: int = 0
    seen: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """The samples consumed so far on this line of history."""
    fingerprints: dict[int, str] = dataclasses.field(default_factory=dict)

    def train(self, samples: int) -> None:
        end = int(min(self.consumed + samples, self.ledger.capacity()))
        self.seen += [tuple(self.ledger.locate(position)) for position in range(self.consumed, end)]
        self.consumed = end
        self.fingerprints[end] = self.ledger.fingerprint(end)

    def resume(self, checkpoint: int) -> None:
        """From a checkpoint at or before the place of the kill; what came after it is forgotten."""
        del self.seen[checkpoint:]
        self.consumed = checkpoint
        self.fingerprints = {at: of for at, of in self.fingerprints.items() if at <= checkpoint}
        self.ledger = self.ledger.activate(checkpoint)

    def check(self) -> None:
        """What holds at every moment."""
        ledger = self.ledger
        assert located(ledger, 0, self.consumed) == self.seen  # replayed from the start, by the ledger as it is now
        for at, fingerprint in self.fingerprints.items():
            assert ledger.fingerprint(at) == fingerprint
        own: list[list[int]] = [[] for _ in ledger.corpora]
        for number, epoch, sample in self.seen:
            assert 0 <= sample < ledger.samples(number)
            own[number].append(epoch * ledger.samples(number) + sample)
        for samples in own:  # each corpus comes in its own order: nothing twice, nothing left out
            assert samples == list(range(len(samples)))
        assert ledger.cursors(self.consumed).tolist() == [len(samples) for samples in own]
        assert loads(dumps(ledger), "memory") == ledger


EPOCHS = st.sampled_from([0.5, 1.0, 1.7, 2.5, 3])


def in_pool(ledger: Ledger) -> dict[str, float | None]:
    """Names and epochs of the corpora that are in at last; by a plain replay of the events."""
    pool: dict[str, float | None] = {}
    for event in sorted(ledger.events, key=lambda event: math.inf if event.at is None else event.at):
        pool |= {ledger.corpora[added.corpus].name: added.epochs for added in event.add}
        pool |= event.epochs
        for name in event.remove:
            del pool[name]
    return pool


def changed(ledger: Ledger, data: st.DataObject, endless: bool, mixtures: bool) -> Ledger:
    """One pending change, at random; what the ledger refuses is no change."""
    epochs = st.one_of(EPOCHS, st.none()) if endless else EPOCHS
    names, domains = sorted(in_pool(ledger)), sorted({entry.domain for entry in ledger.corpora})
    kind = data.draw(st.sampled_from(["add", "add", "remove", "reweight", "mixture", "cancel"]))
    weights = st.fixed_dictionaries({domain: st.sampled_from([0.0, 1.0, 2.5]) for domain in domains})
    try:
        if kind == "add":
            domain = data.draw(st.sampled_from(["zh", "en"]))
            new = corpus(f"c{len(ledger.corpora)}", data.draw(st.integers(1, 12)), domain)
            return ledger.add([new], data.draw(epochs))
        if kind == "remove" and len(names) > 1:
            return ledger.remove([data.draw(st.sampled_from(names))])
        if kind == "reweight":
            return ledger.reweight({data.draw(st.sampled_from(names)): data.draw(epochs)})
        if kind == "mixture" and mixtures:
            return ledger.set_mixture(data.draw(st.one_of(st.none(), weights)))
        return ledger.cancel() if kind == "cancel" else ledger
    except DataError:
        return ledger


def resumed(run: Run, checkpoint: int) -> None:
    """Resume; what does not fit there, as a later change was made for another pool, is taken back."""
    try:
        run.ledger.activate(checkpoint)
    except DataError:
        run.ledger = run.ledger.cancel()
    run.resume(checkpoint)


@given(data=st.data(), endless=st.booleans(), mixtures=st.booleans())
@settings(max_examples=80, deadline=None)
def test_random_histories(data: st.DataObject, endless: bool, mixtures: bool) -> None:
    first = [corpus(f"c{n}", data.draw(st.integers(1, 12)), "zh" if n else "en") for n in range(2)]
    run = Run(ledger_of(*first))
    for _ in range(data.draw(st.integers(1, 6))):
        run.train(data.draw(st.integers(0, 25)))
        run.check()
        for _ in range(data.draw(st.integers(0, 2))):
            run.ledger = changed(run.ledger, data, endless, mixtures)
            run.check()  # what is pending alters nothing
        resumed(run, data.draw(st.sampled_from(sorted({0, run.consumed, *run.fingerprints}))))
        run.check()
    if run.ledger.capacity() < math.inf and all(event.mixture is None for event in run.ledger.events):
        # Nothing unseen is lost: in the end, what is in was read to the end of its epochs.
        run.train(10**6)
        run.check()
        pool, reached = in_pool(run.ledger), [event.at or 0 for event in run.ledger.events]
        if max(reached) <= run.consumed:
            for number, entry in enumerate(run.ledger.corpora):
                if entry.name in pool:
                    limit = samples_in(pool[entry.name] or 1, run.ledger.samples(number))
                    before = int(run.ledger.cursors(max(reached))[number])  # more than that if it was lowered then
                    assert run.ledger.cursors(run.consumed)[number] == max(limit, before)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_epochs_are_counted_exactly(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    epochs = [data.draw(EPOCHS) for _ in sizes]
    ledger = Ledger(LENGTH, data.draw(st.integers(0, 2**63 - 1)))
    for number, (size, often) in enumerate(zip(sizes, epochs, strict=True)):
        if samples_in(often, size):
            ledger = ledger.add([corpus(f"c{number}", size)], often, at=0)
    times = Counter(
        (ledger.corpora[number].name, sample) for number, _, sample in located(ledger, 0, int(ledger.capacity()))
    )
    for number, (size, often) in enumerate(zip(sizes, epochs, strict=True)):
        whole, rest = divmod(samples_in(often, size), size)
        for sample in range(size):
            assert times[f"c{number}", sample] == whole + (sample < rest)


def test_epochs_are_the_decimal_numbers_that_were_written() -> None:
    assert [samples_in(epochs, 10) for epochs in (0.1, 0.3, 0.7, 2.5, 1, 0.05)] == [1, 3, 7, 25, 10, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_order(ranks: int) -> None:
    ledger = ledger_of(corpus("a", 40), corpus("b", 60))
    shares = [micro_batches(16, 16, 2, rank, ranks) for rank in range(ranks)]
    read = [tuple(ledger.locate(number)) for step in zip(*shares, strict=True) for own in step for number in own]
    assert read == located(ledger, 16, 32)


# ---- the parts ----


def test_the_order_is_the_same_for_ever() -> None:
    ledger = ledger_of(corpus("a", 5), corpus("b", 3)).add([corpus("c", 4)], None, at=4)
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
    ledger = ledger_of(corpus("a", 1000)).add([corpus("b", 600)]).activate(400)
    numbers = np.array([number for number, *_ in located(ledger, 0, 1600)])
    assert not numbers[:400].any() and numbers[400:].sum() == 600
    for stretch in np.split(numbers[400:], 12):
        assert 48 <= stretch.sum() <= 52


def test_the_example_of_the_docs() -> None:
    ledger = ledger_of(corpus("zh", 6), epochs=2.0).add([corpus("code", 4)])
    assert ledger.events[-1].at is None and ledger.capacity() == 12
    resumed_at_5 = ledger.activate(5)
    assert resumed_at_5.capacity() == 16
    rest = located(resumed_at_5, 5, 16)
    assert sorted(rest) == [(0, 0, 5), *((0, 1, n) for n in range(6)), *((1, 0, n) for n in range(4))]
    assert rest != sorted(rest)


def test_endless_corpora_come_in_rounds() -> None:
    ledger = ledger_of(corpus("web", 10), epochs=None).add([corpus("book", 5)], 1.0, at=0)
    assert ledger.capacity() == math.inf
    assert Counter(number for number, *_ in located(ledger, 0, 15)) == {0: 10, 1: 5}
    assert located(ledger, 15, 1015) == [(0, 1 + n // 10, n % 10) for n in range(1000)]
    assert ledger.cursors(10**9).tolist() == [10**9 - 5, 5]
    assert tuple(ledger.locate(10**9)) == located(ledger, 10**9, 10**9 + 1)[0]
    # What comes in when an epoch is half read: the round is what is left of it.
    halfway = ledger_of(corpus("web", 10), epochs=None).add([corpus("book", 5)]).activate(4)
    assert Counter(number for number, *_ in located(halfway, 4, 15)) == {0: 6, 1: 5}


def test_a_mixture_is_held_until_a_corpus_is_used_up() -> None:
    ledger = ledger_of(corpus("a", 300, "zh"), corpus("b", 100, "zh"), corpus("c", 1000, "en"))
    ledger = ledger.set_mixture({"zh": 3, "en": 1}, at=0)
    assert ledger.capacity() == 533  # 400 of zh are three quarters of it
    corpora = np.array([number for number, *_ in located(ledger, 0, 533)])
    assert np.abs(np.bincount(corpora) - [300, 100, 133]).max() <= 1
    for number, share in ((0, 9 / 16), (1, 3 / 16), (2, 1 / 4)):
        assert np.abs(np.cumsum(corpora == number) - share * np.arange(1, 534)).max() < 3
    with pytest.raises(DataError, match=r"has 533 samples, and 534 were asked for: the mixture used up domain 'zh'"):
        ledger.locate(533)
    paused = ledger.set_mixture({"zh": 0, "en": 1}).activate(533)
    assert {number for number, *_ in located(paused, 533, 1000)} == {2}
    used_up = ledger.set_mixture({"zh": 1, "en": 0}).activate(533).set_mixture(None, at=600)
    with pytest.raises(DataError, match="has 533 samples, before what is planned for sample 600"):
        used_up.locate(540)


def test_a_mixture_without_end_repeats_small_corpora() -> None:
    ledger = ledger_of(corpus("small", 10, "zh"), corpus("large", 1000, "en"), epochs=None)
    ledger = ledger.set_mixture({"zh": 1, "en": 1}, at=0)
    assert ledger.capacity() == math.inf
    assert ledger.cursors(100_000).tolist() == pytest.approx([50_000, 50_000], abs=1)
    assert ledger.locate(10**14).epoch > 0  # beyond the first round


def test_a_curriculum_is_planned_and_an_append_comes_between() -> None:
    planned = ledger_of(corpus("a", 500, "zh"), corpus("b", 500, "en")).set_mixture({"zh": 1, "en": 3}, at=600)
    grown = planned.add([corpus("c", 200, "zh")]).activate(200)
    assert located(grown, 0, 200) == located(planned, 0, 200)
    assert located(grown, 200, 400) != located(planned, 200, 400)
    assert [event.at for event in grown.events] == [0, 600, 200]
    stage = Counter(grown.corpora[number].domain for number, *_ in located(grown, 600, 800))
    assert stage["zh"] == pytest.approx(50, abs=3)
    # A stage that the run has passed comes before what is pending until then.
    late = planned.add([corpus("c", 200, "zh")]).activate(650)
    assert located(late, 0, 650) == located(planned, 0, 650)
    # Resumed from before a change, the change stays where it is, and can be taken back.
    again = grown.activate(100)
    assert located(again, 0, 800) == located(grown, 0, 800)
    assert again.cancel(200).locate_range(0, 500)[0].max() == 1


def test_removed_corpora_do_not_come_again() -> None:
    ledger = ledger_of(corpus("a", 100), corpus("b", 100)).remove(["a"]).activate(50)
    assert 0 in {number for number, *_ in located(ledger, 0, 50)}
    assert {number for number, *_ in located(ledger, 50, int(ledger.capacity()))} == {1}
    assert ledger.cursors(int(ledger.capacity()))[1] == 100
    assert ledger.in_use() == [1]
    with pytest.raises(DataError, match="is in the ledger already, as a "):
        ledger.add([corpus("a", 100)])


def test_a_paused_domain_may_lose_its_last_corpus() -> None:
    ledger = two().set_mixture({"zh": 1, "en": 0}, at=0).remove(["b"]).activate(10)
    assert ledger.capacity() == 100


def test_lower_epochs_end_a_corpus_that_was_read_so_far() -> None:
    ledger = ledger_of(corpus("a", 100), corpus("b", 100), epochs=3)
    lowered = ledger.reweight({"a": 0.1}).activate(300)
    assert lowered.capacity() == 300 + 300 - int(lowered.cursors(300)[1])
    raised = lowered.reweight({"a": 3}).activate(400)
    assert raised.cursors(int(raised.capacity())).tolist() == [300, 300]


def test_a_cancelled_corpus_can_come_in_later() -> None:
    ledger = ledger_of(corpus("a", 10)).add([corpus("b", 10)]).cancel()
    assert ledger.pending == () and ledger.capacity() == 10
    again = ledger.add([corpus("b", 10, domain="other")], 2.0).activate(10)
    assert again.capacity() == 30 and len(again.corpora) == 2 and again.corpora[1].domain == "other"


def test_fingerprints_say_what_decided_the_past() -> None:
    ledger = two()
    base = ledger.fingerprint(50)
    later = ledger.remove(["b"], at=50).set_mixture({"zh": 1.0}, at=60)
    assert later.fingerprint(50) == base != later.fingerprint(51)
    moved = dataclasses.replace(ledger.corpora[0], prefix="/elsewhere/a", name="renamed")
    assert dataclasses.replace(ledger, corpora=(moved, ledger.corpora[1])).fingerprint(50) == base
    dropped = dataclasses.replace(ledger.corpora[0], dropped=Dropped("0" * 64, 1, 1))
    others = [
        dataclasses.replace(ledger, seed=1),
        dataclasses.replace(ledger, sequence_length=4),
        dataclasses.replace(ledger, corpora=(dropped, ledger.corpora[1])),
        ledger_of(corpus("b", 100, "en"), corpus("a", 100, "zh")),
        ledger_of(corpus("a", 100, "zh"), corpus("b", 100, "zh")),
        ledger_of(corpus("a", 101, "zh"), corpus("b", 100, "en")),
        ledger_of(corpus("a", 100, "zh"), corpus("x", 100, "en")),
        ledger_of(*ledger.corpora, epochs=1.5),
        ledger.set_mixture({"zh": 1.0, "en": 1.0}, at=49),
    ]
    assert len({base, *(other.fingerprint(50) for other in others)}) == 1 + len(others)


def test_a_ledger_of_256_corpora_and_1e8_samples() -> None:
    corpora = [corpus(f"c{n}", 300_000 + 1000 * n, f"d{n % 7}") for n in range(256)]
    ledger = ledger_of(*corpora).set_mixture({f"d{n}": n + 1 for n in range(7)}, at=10**7)
    end = 3 * 10**7
    assert int(ledger.cursors(end).sum()) == end
    assert [tuple(ledger.locate(position)) for position in range(end, end + 50)] == located(ledger, end, end + 50)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: two().add([corpus("a", 100)]), "/data/a is in the ledger already, as a .*skip"),
        (lambda: two().add([corpus("c", 9), corpus("c", 9)]), "is in the ledger already, as c "),
        (lambda: two().add([dataclasses.replace(corpus("c", 9), name="a")]), r"corpus a .* has the name a of a "),
        (lambda: two().add([corpus("c", 0)]), r"/data/c: 1 tokens make no sample of sequence_length \+ 1 = 9 tokens"),
        (lambda: two().add([corpus("c", 9)], 0.0), "epochs is 0.0; it must be a number above 0, or null"),
        (lambda: two().add([corpus("c", 9)], math.nan), "epochs is nan"),
        (lambda: two().add([corpus("c", 2**20)], 2.0**30), "corpus 'c' has 1,048,576 samples .* lower epochs"),
        (lambda: two().add([corpus("c", 9, "math")], mixture={"zh": 1.0}), "does not name domain 'en'"),
        (lambda: two().set_mixture({"zh": 1, "en": 1}).add([corpus("c", 9, "math")]), "does not name domain 'math'"),
        (lambda: two().activate(50).add([corpus("c", 9)], at=49), "at sample 49 is no good: .* resumed at 50"),
        (lambda: two().remove(["c"]), "the ledger has no corpus 'c'; it has a, b"),
        (lambda: two().remove(["a"], at=10).remove(["a"], at=20), "'a' is not in the pool at sample 20"),
        (lambda: two().set_mixture({"zh": 1, "en": 1}, at=0).remove(["b"]), "domain 'en' the weight 1, but no corpus"),
        (lambda: two().reweight({"a": -1}), "epochs of a is -1"),
        (lambda: two().reweight({"c": 1}), "the ledger has no corpus 'c'"),
        (lambda: two().set_mixture({"zh": 1}), "does not name domain 'en' .of b.*0 to pause it"),
        (lambda: two().set_mixture({"zh": 1, "en": 1, "fr": 1}), "domain 'fr' the weight 1, but no corpus"),
        (lambda: two().set_mixture({"zh": 0, "en": 0}), "the mixture is .* at least one above 0"),
        (lambda: two().set_mixture({"zh": -1, "en": 2}), "the mixture is "),
        (lambda: two().set_mixture({}), "the mixture is {}"),
        (lambda: two().cancel(), "nothing is pending"),
        (lambda: two().cancel(70), "nothing is planned for sample 70"),
        (lambda: two().remove(["a"], at=20).activate(20).cancel(20), "what happened at sample 20 stays"),
        (lambda: two().activate(201), "has 200 samples, and 201 were asked for: every corpus is read .*a, b"),
        (lambda: two().locate(200), "has 200 samples, and 201 were asked for"),
        (lambda: two().locate_range(0, 201), "has 200 samples, and 201 were asked for"),
        (lambda: two().require(999, "train_steps"), "has 200 samples, and 999 were asked for by train_steps: every"),
        (lambda: two().set_mixture(None, at=300).locate(250), "200 samples, before what is planned for sample 300"),
        (lambda: two().set_mixture(None, at=201).locate(200), "200 samples, before what is planned for sample 201"),
        (lambda: two().remove(["a", "b"], at=20).locate(20), "has 20 samples, and 21 .*: no corpus is in it"),
        (lambda: Ledger(LENGTH, 0).locate(0), "has 0 samples, and 1 were asked for: no corpus is in it"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrong()


def test_tokenizers_are_not_mixed() -> None:
    ledger = ledger_of(dataclasses.replace(corpus("a", 9), tokenizer="qwen"), corpus("megatron", 9))
    ledger.add([dataclasses.replace(corpus("b", 9), tokenizer="qwen")])
    with pytest.raises(DataError, match="different tokenizers cannot be mixed: qwen of a, llama of c"):
        ledger.add([dataclasses.replace(corpus("c", 9), tokenizer="llama")])


def test_duplicates_are_skipped_where_that_is_wished(caplog: pytest.LogCaptureFixture) -> None:
    same = dataclasses.replace(corpus("a", 100, "zh"), name="again", prefix="/data/again")
    assert two().add([same], on_duplicate="skip") == two()
    assert "/data/again is in the ledger already, as a (/data/a): the same tokens; it is skipped" in caplog.text
    grown = two().add([same, corpus("c", 9)], on_duplicate="skip", at=10)
    assert [entry.name for entry in grown.corpora] == ["a", "b", "c"]
