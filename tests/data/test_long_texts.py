"""Long texts encode to the same ids in pieces as in one go."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.data.encoding import Encoder, Position, Task
from steel_megatron.data.formats import Place, RawChunk
from steel_megatron.data.indexed import token_dtype
from steel_megatron.data.long_texts import pieces
from steel_megatron.data.named_sources import get_source
from steel_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data.conftest import make_texts


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(qwen_folder, engine="tokenizers")


def real_text(shared_dir: Path) -> str:
    """Rows of real corpora, Chinese, English and code, one after the other."""
    folder, texts = shared_dir / "data" / "steel_samples", []
    for name, key in (("part-010205-a894b46e_sample.jsonl", "content"), ("firefly-train-1.1M_sample.jsonl", "target")):
        with (folder / name).open(encoding="utf-8") as file:
            texts += [json.loads(line)[key] for line in itertools.islice(file, 150)]
    return "\n".join([*texts, *make_texts(50)])


def test_pieces_of_real_text(shared_dir: Path, qwen: HuggingFaceTokenizer) -> None:
    text = real_text(shared_dir)
    whole = qwen.encode(text)
    for longest in (3000, 20_000):
        found = pieces(text, qwen.encode, longest)
        assert "".join(found) == text and len(found) > len(text) // longest
        assert max(map(len, found)) <= longest
        assert [index for piece in found for index in qwen.encode(piece)] == whole


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["ab", "字", "。", "\n", " ", "  ", "\n\n", "a", "1", "-", "\u3000", "é", "▁"]), min_size=60
    ),
    longest=st.integers(20, 60),
)
def test_pieces_of_any_text(sp: SentencePieceTokenizer, words: list[str], longest: int) -> None:
    text = "".join(words)
    found = pieces(text, sp.encode, longest)
    assert "".join(found) == text and all(found)
    assert [index for piece in found for index in sp.encode(piece)] == sp.encode(text)


def test_a_text_without_a_place_stays_whole(sp: SentencePieceTokenizer) -> None:
    assert pieces("a" * 1000, sp.encode, 100) == ["a" * 1000]
    assert pieces("a" * 1000 + "\nb" + "c" * 99, sp.encode, 100) == ["a" * 1000 + "\n", "b" + "c" * 99]
    assert pieces("", sp.encode, 100) == [""]


def encoded(tokenizer: Tokenizer, rows: list[dict[str, object]], long: int) -> tuple[list[int], list[int]]:
    payload = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    chunk = RawChunk("x.jsonl", "lines", payload, len(rows), 1, 0, Place(len(rows)))
    encoder = Encoder(tokenizer, token_dtype(tokenizer.vocab_size), {"text": {"text": get_source("text")}}, long=long)
    documents = encoder.encode(Task(((0, "text", chunk),), Position())).documents["train", "text"]
    return documents.ids.tolist(), documents.lengths.tolist()


def test_the_encoder_puts_pieces_together(
    shared_dir: Path, qwen: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = real_text(shared_dir)
    texts = [text[:200_000], "short", text[200_000:300_000], *make_texts(30)]
    dialogue = f"<|im_start|>user\n{text[:90_000]}<|im_end|>\n<|im_start|>assistant\n好<|im_end|>"
    rows: list[dict[str, object]] = [{"text": text} for text in texts]
    rows[2:2] = [{"text": dialogue, "dialogue": True}, {"text": dialogue[-40:], "dialogue": True}]
    ids, lengths = encoded(qwen, rows, long=1 << 30)
    longest: list[int] = []
    encode = qwen.encode_flat

    def watched(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        longest.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(qwen, "encode_flat", watched)
    assert encoded(qwen, rows, long=70_000) == (ids, lengths)
    assert max(longest) <= 70_000 and len(longest) > 5
