"""Questions and answers of benchmarks that occur in indexed corpora: overlap of n-grams, with the documents found.

The unit of an n-gram is a word, or a Chinese, Japanese or Korean character; case, punctuation and spaces do not count.
The n-grams of the benchmarks are held in memory, corpora are read document by document: memory depends on the
benchmarks alone.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from steel_megatron.data.indexed.dataset import IndexedCorpus, open_indexed, refuse_other_tokenizer
from steel_megatron.data.indexed.inspection import expand_prefixes
from steel_megatron.data.tokenizing.tokenizer import Tokenizer
from steel_megatron.errors import ConfigError
from steel_megatron.log import progress

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BUCKETS = 1 << 22
"""Of the filter that most n-grams of a corpus do not pass; a bit each, by the hash's last bits."""
_AT_ONCE = 1 << 20
"""Units of documents that are compared together."""
_KNOWN_UNITS = 1 << 20
_DOCUMENTS = 5
"""Documents that are listed of each item: those with the largest overlap."""
_EXCERPT = 120


def units_of(text: str) -> list[str]:
    """The units of a text, in order: words in lower case, and single CJK characters."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        task: the harness's name of the subject.
        number: of the question, from 1.
        question: its text, without options.
        answer: the text of the right answer.
    """

    task: str
    number: int
    question: str
    answer: str


@dataclass(frozen=True, order=True)
class Found:
    """A document that an item overlaps with.

    Attributes:
        overlap: how many of the item's n-grams are in it.
        corpus: prefix of the corpus.
        document: its number there, from 0.
        origin: file and row that it came from, where the corpus records it.
        excerpt: the first n-gram that was found.
    """

    overlap: int
    corpus: str
    document: int
    origin: str
    excerpt: str


@dataclass
class Overlap:
    """What was found of an item.

    Attributes:
        ngrams: different n-grams of the question and of the answer.
        found: those that occur in a corpus.
        documents: how many documents hold one.
        largest: the documents with the largest overlap, the largest first.
    """

    ngrams: dict[str, set[int]]
    found: set[int] = field(default_factory=set)
    documents: int = 0
    largest: list[Found] = field(default_factory=list)

    def share(self, part: str) -> float:
        """Share of the n-grams of ``question`` or ``answer`` that were found."""
        own = self.ngrams[part]
        return len(own & self.found) / len(own) if own else 0.0


@dataclass(frozen=True)
class Contamination:
    """The items of benchmarks and what was found of them.

    Attributes:
        n: units of an n-gram.
        overlaps: by item; items without an n-gram are not among them.
        too_short: items with fewer than n units in the question and in the answer.
        corpora: prefixes.
        documents: that were read.
        text_bytes: of these, in UTF-8.
    """

    n: int
    overlaps: dict[Item, Overlap]
    too_short: list[Item]
    corpora: list[str]
    documents: int
    text_bytes: int

    @property
    def found(self) -> dict[Item, Overlap]:
        """The items that overlap with a corpus, those with the largest share first."""
        dirty = {item: one for item, one in self.overlaps.items() if one.found}
        return dict(sorted(dirty.items(), key=lambda pair: -max(pair[1].share("question"), pair[1].share("answer"))))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "n": self.n,
            "corpora": self.corpora,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "tasks": self.by_task(),
            "items": [
                {
                    "task": item.task,
                    "number": item.number,
                    "question": item.question,
                    "answer": item.answer,
                    "question_share": one.share("question"),
                    "answer_share": one.share("answer"),
                    "documents": one.documents,
                    "largest": [vars(document) for document in one.largest],
                }
                for item, one in self.found.items()
            ],
        }

    def by_task(self) -> dict[str, dict[str, int]]:
        """Counts of each task: items, those compared, those found by question and by answer."""
        counts: dict[str, dict[str, int]] = {}
        zero = {"items": 0, "compared": 0, "question": 0, "answer": 0}
        for item in [*self.too_short, *self.overlaps]:
            task = counts.setdefault(item.task, dict(zero))
            task["items"] += 1
            if one := self.overlaps.get(item):
                task["compared"] += 1
                task["question"] += bool(one.ngrams["question"] & one.found)
                task["answer"] += bool(one.ngrams["answer"] & one.found)
        return dict(sorted(counts.items()))

    def to_text(self, items: int = 10) -> str:
        """Counts by task, and the items with the largest overlap, in lines of at most 80 characters."""
        lines = [
            f"n-grams of {self.n} words or CJK characters, in {self.documents:,} documents ({self.text_bytes:,} bytes)",
            f"{'task':<44}{'items':>8}{'compared':>10}{'question':>9}{'answer':>9}",
        ]
        for task, counts in self.by_task().items():
            name = task if len(task) <= 43 else task[:42] + "…"
            cells = [counts[key] for key in ("items", "compared", "question", "answer")]
            lines.append(f"{name:<44}{cells[0]:>8,}{cells[1]:>10,}{cells[2]:>9,}{cells[3]:>9,}")
        for item, one in list(self.found.items())[:items]:
            shares = f"{one.share('question'):.0%} of the question, {one.share('answer'):.0%} of the answer"
            lines += ["", f"{item.task} {item.number}: {shares}, in {one.documents:,} documents"]
            lines += [
                f"  {place}" for found in one.largest[:2] for place in (found.origin, found.excerpt[:70]) if place
            ]
        if self.too_short:
            lines += ["", f"not compared, shorter than {self.n} words: {len(self.too_short):,} items"]
        found = len(self.found)
        lines += ["", f"{found:,} of {len(self.overlaps):,} compared items overlap" if found else "no item overlaps"]
        return "\n".join(lines)


class Ngrams:
    """Hashes of all n-grams of a list of units; units get their hash once.

    Args:
        n: units of an n-gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._hashes: dict[str, int] = {}

    def of(self, units: Sequence[str]) -> np.ndarray:
        """uint64 [max(0, units - n + 1)], the hash of the n-gram that begins at each unit."""
        if len(self._hashes) > _KNOWN_UNITS:
            self._hashes.clear()
        hashes = self._hashes
        for unit in set(units) - hashes.keys():
            hashes[unit] = xxhash.xxh3_64_intdigest(unit.encode("utf-8", "surrogatepass"))
        numbers = np.fromiter(map(hashes.__getitem__, units), np.uint64, len(units))
        count = max(0, len(units) - self.n + 1)
        result = np.zeros(count, np.uint64)
        for offset in range(self.n if count else 0):  # a polynomial, modulo 2**64
            result *= _FACTOR
            result += numbers[offset : offset + count]
        return result


def find_overlaps(items: Sequence[Item], prefixes: Sequence[str], tokenizer: Tokenizer, n: int = 13) -> Contamination:
    """Look for the n-grams of items in corpora.

    Args:
        items: of benchmarks.
        prefixes: of indexed corpora, or patterns.
        tokenizer: the corpora's.
        n: units of an n-gram.

    Raises:
        ConfigError: n is below 2.
        DataError: a corpus is damaged, or was made with another tokenizer.
    """
    corpora = open_corpora(prefixes, tokenizer, n)
    ngrams = Ngrams(n)
    overlaps, too_short = {}, []
    owners: dict[int, list[Overlap]] = {}
    for item in items:
        parts = {"question": item.question, "answer": item.answer}
        own = {part: set(ngrams.of(units_of(text)).tolist()) for part, text in parts.items()}
        if not any(own.values()):
            too_short.append(item)
            continue
        overlaps[item] = Overlap(own)
        for number in set().union(*own.values()):
            owners.setdefault(number, []).append(overlaps[item])
    search = _Search(owners, ngrams)
    for corpus in corpora:
        for batch in _batches(corpus, tokenizer):
            search.read(corpus, batch)
    for one in overlaps.values():
        one.largest.sort(reverse=True)
    prefixes = [corpus.prefix for corpus in corpora]
    return Contamination(n, overlaps, too_short, prefixes, search.documents, search.text_bytes)


def open_corpora(prefixes: Sequence[str], tokenizer: Tokenizer, n: int = 13) -> list[IndexedCorpus]:
    """What :func:`find_overlaps` reads, opened.

    Args:
        prefixes, tokenizer, n: as there.

    Raises:
        ConfigError: n is below 2.
        DataError: a corpus is damaged, or was made with another tokenizer.
    """
    if n < 2:
        raise ConfigError(f"ngram = {n} must be at least 2")
    corpora = [open_indexed(prefix, tokenizer.vocab_size) for prefix in expand_prefixes(prefixes)]
    for corpus in corpora:
        refuse_other_tokenizer(corpus, tokenizer.fingerprint)
    return corpora


def _batches(corpus: IndexedCorpus, tokenizer: Tokenizer) -> Iterator[list[tuple[int, str, list[str]]]]:
    """Documents as number, text and units, in batches of about as many units."""
    batch: list[tuple[int, str, list[str]]] = []
    size = 0
    with progress(f"reading {Path(corpus.prefix).name}", corpus.documents, "documents") as shown:
        for document in range(corpus.documents):
            text = tokenizer.decode(corpus.document(document).tolist())
            batch.append((document, text, units_of(text)))
            size += len(batch[-1][2])
            if size >= _AT_ONCE or document == corpus.documents - 1:
                yield batch
                shown.advance(len(batch))
                batch, size = [], 0


class _Search:
    """The hash table of the benchmarks' n-grams, and what was read so far.

    Args:
        owners: the items that have an n-gram, by its hash.
        ngrams: gives hashes.
    """

    def __init__(self, owners: dict[int, list[Overlap]], ngrams: Ngrams) -> None:
        self._owners, self._ngrams = owners, ngrams
        self._filter = np.zeros(_BUCKETS, dtype=bool)
        self._filter[np.fromiter(owners, np.uint64, len(owners)) % np.uint64(_BUCKETS)] = True
        self.documents = self.text_bytes = 0

    def read(self, corpus: IndexedCorpus, batch: list[tuple[int, str, list[str]]]) -> None:
        """Note the n-grams of a batch of documents; none goes over the end of a document."""
        n = self._ngrams.n
        hashes = self._ngrams.of([unit for _, _, units in batch for unit in units])
        places = np.flatnonzero(self._filter[hashes % np.uint64(_BUCKETS)])
        ends = np.cumsum([len(units) for _, _, units in batch])
        number_of = np.searchsorted(ends, places, side="right")
        hits: dict[int, list[tuple[int, int]]] = {}
        for place, number in zip(places.tolist(), number_of.tolist(), strict=True):
            value = int(hashes[place])
            if value in self._owners and place + n <= ends[number]:
                hits.setdefault(number, []).append((place, value))
        for number, found in hits.items():
            document, _, units = batch[number]
            self._note(corpus, document, units, int(ends[number]) - len(units), found)
        self.documents += len(batch)
        self.text_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for _, text, _ in batch)

    def _note(
        self, corpus: IndexedCorpus, document: int, units: list[str], start: int, found: list[tuple[int, int]]
    ) -> None:
        values = {value for _, value in found}
        origin = corpus.origin(document)
        place = f"{origin.path}, row {origin.row}" if origin else f"{corpus.prefix}, document {document}"
        for overlap in {id(one): one for value in values for one in self._owners[value]}.values():
            own = values & set().union(*overlap.ngrams.values())
            first = next(at for at, value in found if value in own) - start
            words = units[first : first + self._ngrams.n]
            excerpt = ("" if all(len(word) == 1 for word in words) else " ").join(words)[:_EXCERPT]
            overlap.found |= own
            overlap.documents += 1
            heapq.heappush(overlap.largest, Found(len(own), corpus.prefix, document, place, excerpt))
            if len(overlap.largest) > _DOCUMENTS:
                heapq.heappop(overlap.largest)
