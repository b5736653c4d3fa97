"""Training from raw corpora: what is learned from, and the figures against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.data.reading.documents import Document
from steel_megatron.data.tokenizing import training as tokenizer_training
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.data.tokenizing.tokenizer import DIALOGUE_MARKS, encode_dialogue
from steel_megatron.data.tokenizing.training import Measure, kind_of, measure, train_tokenizer
from steel_megatron.errors import DataError
from tests.data.conftest import EN, ZH, make_texts, write_jsonl


@pytest.mark.parametrize(
    ("text", "path", "source", "kind"),
    [
        ("长江 " * 3, "a.jsonl", "text", "zh"),
        ("abcdefgh长江", "a.jsonl", "text", "zh"),
        ("abcdefghi长江", "a.jsonl", "text", "en"),
        ("Тихий Дон", "a.txt", "text", "en"),
        ("# 长江", "a.py", "text", "code"),
        ("x = 1", "a.parquet", "starcoder", "code"),
    ],
)
def test_kinds_of_text(text: str, path: str, source: str, kind: str) -> None:
    assert kind_of(Document(text, path, 1), source) == kind


@pytest.mark.parametrize("batch", [1, 50, 10**6])
def test_figures_equal_a_count_by_hand(sp: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(tokenizer_training, "_BATCH_CHARACTERS", batch)
    rows = [(kind, Document(text, "f", 1)) for kind, texts in (("zh", ZH), ("en", EN)) for text in texts]
    dialogue = Document(f"{DIALOGUE_MARKS[0]}user\n长江{DIALOGUE_MARKS[1]}", "f", 1, dialogue=True)
    found = measure(sp, [*rows[::2], ("zh", dialogue), *rows[1::2]])  # type: ignore[arg-type]
    assert list(found) == ["en", "zh"]
    sizes = [len(text.encode()) for text in EN], [len(sp.encode(text)) for text in EN]
    assert found["en"] == Measure(len(EN), *map(sum, sizes))
    assert found["en"].bytes_per_token == sum(sizes[0]) / sum(sizes[1])
    tokens = sum(len(sp.encode(text)) for text in ZH) + len(encode_dialogue(sp, dialogue.text))
    assert (found["zh"].documents, found["zh"].tokens) == (len(ZH) + 1, tokens)


def test_training_on_sources_and_measuring_on_other_text(tmp_path: Path) -> None:
    rows = [{"instruction": text, "input": "", "output": f"答：{text}"} for text in make_texts(120)]
    (tmp_path / "belle.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    held_out = write_jsonl(tmp_path / "valid.jsonl", [*make_texts(30, seed=1), "", " "])
    trained = train_tokenizer(
        [f"belle={tmp_path}/belle.jsonl"], tmp_path / "tokenizer", 600, valid=[str(held_out)], on_bad_row="skip"
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    assert trained.tokenizer.fingerprint == tokenizer.fingerprint and tokenizer.vocab_size == 600
    assert [tokenizer.control_id(mark) for mark in DIALOGUE_MARKS] == [3, 4]
    # The marks of the training text are no text to learn: they are spelled, not pieces.
    assert len(tokenizer.encode(DIALOGUE_MARKS[0])) >= 8
    report = trained.as_dict()
    assert report["held_out"] is True and report["skipped"] == 2
    assert sum(kind["documents"] for kind in report["kinds"].values()) == 30
    assert {"fingerprint", "vocab_size", "eod_id", "kind", "model"} < set(json.loads(json.dumps(report)))


def test_skipped_rows_are_counted_once(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*make_texts(60), "", " "])
    trained = train_tokenizer([str(source)], tmp_path / "t", 500, on_bad_row="skip")
    assert trained.skipped == 2 and not trained.held_out
    assert sum(kind.documents for kind in trained.kinds.values()) == 60


def test_held_out_text_must_be_held_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    other = write_jsonl(tmp_path / "b.jsonl", make_texts(5))
    with pytest.raises(DataError, match=r"a\.jsonl is among the text to train on and the held-out text"):
        train_tokenizer([str(source)], tmp_path / "t", 500, valid=[str(other), str(source)])
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"control_tokens": ["<a>", "<a>"]}, r"<a> is already defined"),
        ({"control_tokens": [""]}, r"cannot be trained on this text"),
        ({"vocab_size": 10**12}, r"vocab_size 1000000000000 cannot be trained"),
        ({"character_coverage": 0.5}, r"character_coverage is 0\.5; it must be within \[0\.98, 1\]"),
        ({"max_bytes": 0}, r"max_bytes is 0"),
        ({"inputs": ["nowhere.jsonl"]}, r"nowhere\.jsonl"),
        ({"inputs": ["nosource=a.jsonl"]}, r"there is no source 'nosource'"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    arguments = {"inputs": [str(source)], "output": tmp_path / "t", "vocab_size": 500, **changed}
    with pytest.raises(DataError, match=message):
        train_tokenizer(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
