"""Many texts in one string of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steel_megatron.data.reading.text_batch import TextBatch
from steel_megatron.errors import DataError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=8)


@given(TEXTS, st.integers(0, 8), st.integers(0, 8))
def test_joined_texts_are_the_texts(texts: list[str], start: int, stop: int) -> None:
    encoded = [text.encode() for text in texts]
    joined = TextBatch.of(texts)
    assert list(joined) == [joined[at] for at in range(len(joined))] == joined[:] == encoded
    assert joined[::-2] == encoded[::-2] and joined.sizes.tolist() == list(map(len, encoded))
    assert list(TextBatch.of(encoded)) == encoded and TextBatch.of(joined) is joined
    if encoded:
        assert joined[-1] == encoded[-1]
    with pytest.raises(IndexError):
        joined[len(encoded)]
    start, stop = min(start, len(texts)), min(stop, len(texts))
    if start <= stop:
        assert list(joined.part(start, stop)) == encoded[start:stop]
    parts = [joined, joined.part(0, start), TextBatch.of(["x"])]
    assert list(TextBatch.concatenate(parts)) == [*encoded, *encoded[:start], b"x"]


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"a lone surrogate \(U\+DFFF at character 1 of 3\), which is no character"):
        TextBatch.of(["a", "b\udfffc"])
