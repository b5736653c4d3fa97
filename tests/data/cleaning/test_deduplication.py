"""Signatures and duplicates, held to plain loops."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import simhash
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.cleaning import deduplication as duplicates
from steel_megatron.data.cleaning.deduplication import (
    EXACT,
    KEPT,
    NEAR,
    SIGNATURE,
    ExactDeduplicator,
    SimhashDeduplicator,
    find_duplicates,
    near_components,
)

ZH = "光合作用把阳光、水和二氧化碳变成糖和氧气，是地球上几乎所有生命的能量来源；植物、藻类和一些细菌都能进行光合作用。"


def signatures(texts: list[str], exact: ExactDeduplicator, near: SimhashDeduplicator) -> np.ndarray:
    rows = [(1, number, *exact.hash(text), near.hash(text)) for number, text in enumerate(texts, start=1)]
    return np.array(rows, dtype=SIGNATURE)


@pytest.mark.parametrize(
    ("text", "shingles"), [("A b\nC  d", ("a b", "b c", "c d")), ("a b c", ("a b", "b c")), ("a", ("a",))]
)
def test_simhash_is_what_most_shingles_have(text: str, shingles: tuple[str, ...]) -> None:
    """A bit that half of them have is not set."""
    near = SimhashDeduplicator(tokenization="space", window_size=2)
    hashes = [hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles]
    bits = [[byte >> (7 - bit) & 1 for byte in digest for bit in range(8)] for digest in hashes]
    expected = sum(
        (2 * sum(column) > len(shingles)) << (8 * (place // 8) + 7 - place % 8)
        for place, column in enumerate(zip(*bits, strict=True))
    )
    assert near.hash(text) == expected


@pytest.mark.parametrize("ignored", [False, True])
def test_texts_without_a_letter_are_not_all_the_same(ignored: bool) -> None:
    """Of nothing but signs nothing is left to compare; then it is the signs that count."""
    exact, near = ExactDeduplicator(), SimhashDeduplicator(ignore_punctuation=ignored)
    texts = ["!!!", "???", "——……——", "!!!", "123 456", "123456", "😀😀", ""]
    found = find_duplicates(signatures(texts, exact, near), exact, near)
    assert found["kind"].tolist() == [KEPT, KEPT, KEPT, EXACT, KEPT, EXACT, KEPT, KEPT]
    assert found["original"].tolist() == [0, 1, 2, 0, 4, 4, 6, 7]


def test_chinese_texts_have_shingles() -> None:
    mixed = SimhashDeduplicator()
    changed = ZH.replace("地球", "世界")
    distance = (mixed.hash(ZH) ^ mixed.hash(changed)).bit_count()
    other = (
        mixed.hash(ZH) ^ mixed.hash("长江发源于青藏高原，向东流经十一个省市，最后注入东海，全长六千三百公里。")
    ).bit_count()
    assert distance < 16 < other
    space = SimhashDeduplicator(tokenization="space")
    assert space.hash(ZH) != space.hash(changed)  # short of a window: one shingle, not none


def test_exact_and_near_copies_across_the_input() -> None:
    long = [ZH + "".join(f"第{number}句说的是别的事情{number * 7919}。" for number in range(60))]
    exact, near = ExactDeduplicator(), SimhashDeduplicator()
    texts = [
        "甲：" + ZH,
        *long,
        "完全不同的一句话，没有人说过。",
        long[0].replace("。", " . "),
        long[0].replace("能量", "动力").replace("植物", "花草"),
    ]
    found = find_duplicates(signatures(texts, exact, near), exact, near)
    assert found["kind"].tolist() == [KEPT, KEPT, KEPT, EXACT, NEAR]
    assert found["original"].tolist() == [0, 1, 2, 1, 1]
    assert (found["distance"] <= 4).all()
    assert find_duplicates(signatures(texts, exact, near), None, None)["kind"].tolist() == [KEPT] * 5
    assert find_duplicates(signatures(texts, exact, near), exact, None)["kind"].tolist() == [KEPT] * 3 + [EXACT, KEPT]
    assert len(find_duplicates(np.empty(0, dtype=SIGNATURE), exact, near)) == 0


def plain_components(pairs: list[tuple[int, int]], count: int) -> list[int]:
    """The smallest index in the component of each of ``count``, by plain loops."""
    smallest = list(range(count))
    for _ in range(count):
        before = list(smallest)
        for i, j in pairs:
            smallest[i] = smallest[j] = min(smallest[i], smallest[j])
        if smallest == before:
            break
    return smallest


def plain_pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    values = [int(value) for value in hashes]
    return [
        (i, j)
        for i in range(len(values))
        for j in range(i)
        if (values[i] ^ values[j]).bit_count() <= distance
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 64), st.booleans(), st.data())
def test_components_are_those_of_plain_loops(
    seed: int, num_blocks: int, width: int, cut: bool, data: st.DataObject
) -> None:
    """Hashes around some centres, and hashes of which only ``width`` bits vary; also where buckets are cut again."""
    distance = data.draw(st.integers(0, num_blocks - 1))
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**64, size=6, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(bit) for bit in draw.choice(64, draw.integers(0, 7), replace=False)) for _ in range(60)],
        dtype=np.uint64,
    )
    varying = draw.choice(64, width, replace=False)
    template = [sum(int(draw.integers(2)) << int(bit) for bit in varying) for _ in range(60)]
    hashes = np.unique(
        np.concatenate([centres[draw.integers(0, 6, size=60)] ^ flips, np.array(template, dtype=np.uint64)])
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        if cut:
            monkeypatch.setattr(duplicates, "_FIRST_STEPS", 1)
            monkeypatch.setattr(duplicates, "_MANY_PAIRS", 0)
            monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 7)
        found = near_components(hashes, num_blocks, distance)
    assert found.tolist() == plain_components(plain_pairs(hashes, distance), len(hashes))


@pytest.mark.parametrize("varying", [22, 42])
def test_documents_of_one_template_are_not_all_compared(varying: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a bucket would be thousands of comparisons a hash; with 22 bits most are one component, with 42 few.

    Up to 300 are 15 choices of equal blocks, with 16 steps in the first round of each.
    """
    hashes = np.unique(np.random.default_rng(0).integers(0, 2**varying, 30_000, dtype=np.uint64))
    count, compared = np.bitwise_count, 0

    def counted(values: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(values)
        assert compared < 300 * len(hashes)
        return count(values)

    monkeypatch.setattr(np, "bitwise_count", counted)
    near_components(hashes, 6, 4)
    assert compared > len(hashes)


def plain_verdicts(table: np.ndarray, distance: int) -> list[bool]:
    """Whether each document is kept: components of near hashes, each exact copy follows its original."""
    values = [int(value) for value in table["simhash"]]
    keys = [(int(row["high"]), int(row["low"])) for row in table]
    component = list(range(len(values)))
    for _ in values:
        for i in range(len(values)):
            for j in range(len(values)):
                if (values[i] ^ values[j]).bit_count() <= distance:
                    component[i] = component[j] = min(component[i], component[j])
    return [component[i] == i and keys.index(keys[i]) == i for i in range(len(values))]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_verdicts_are_those_of_plain_loops(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    table = np.zeros(count, dtype=SIGNATURE)
    table["high"] = draw.integers(0, max(count // 2, 1), size=count)
    centres = draw.integers(0, 2**64, size=3, dtype=np.uint64)
    steps = np.array(
        [(1 << int(draw.integers(1, 12))) - 1 for _ in range(count)], dtype=np.uint64
    )  # chains of near ones
    table["simhash"] = centres[draw.integers(0, 3, size=count)] ^ steps
    found = find_duplicates(table, ExactDeduplicator(), SimhashDeduplicator())
    assert (found["kind"] == KEPT).tolist() == plain_verdicts(table, 4)
    originals = found["original"][found["kind"] != KEPT]
    assert (found["kind"][originals] == KEPT).all() and (originals < np.flatnonzero(found["kind"] != KEPT)).all()


def test_agrees_with_the_package_that_data_juicer_uses() -> None:
    draw = np.random.default_rng(3)
    centres = draw.integers(0, 2**64, size=40, dtype=np.uint64)
    hashes = np.unique(
        np.concatenate([centres, centres ^ np.uint64(0b1011), centres ^ np.uint64(1 << 60 | 1 << 3 | 0xF0)])
    )
    theirs = [(max(pair), min(pair)) for pair in simhash.find_all(hashes.tolist(), 6, 4)]
    places = {int(value): place for place, value in enumerate(hashes)}
    by_place = [(places[left], places[right]) for left, right in theirs]
    found = near_components(hashes, 6, 4)
    assert found.tolist() == plain_components(by_place, len(hashes)) and len(np.unique(found)) == len(hashes) - 40
