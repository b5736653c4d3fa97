"""Conversations and pairs to corpora with labels, and what a run reads of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.cli import main
from steel_megatron.config import PrepareConfig
from steel_megatron.data.indexed.dataset import open_indexed, verify
from steel_megatron.data.indexed.labels import LABEL, SECOND, SHORTENED, open_labels
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.ledger.loader import LedgerSamples, document_of
from steel_megatron.data.preprocessing.chat import prepare
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from tests.fixtures.make_tokenizer import make_tokenizer

LONG = "word " * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def exchange(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": said} for number, said in enumerate(contents)]}


@pytest.fixture
def job(tokenizer: Path, tmp_path: Path) -> Callable[..., PrepareConfig]:
    def build(rows: list[dict[str, Any]], **settings: Any) -> PrepareConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        defaults = {"max_tokens": 80, "on_bad_row": "skip", "overwrite": True}
        prefix = str(tmp_path / "chat")
        return PrepareConfig(
            inputs=[str(path)], output_prefix=prefix, tokenizer_path=str(tokenizer), **{**defaults, **settings}
        )

    return build


def labelled(config: PrepareConfig) -> list[list[str]]:
    """Of each document, the texts of its runs of predicted tokens, end marks left out."""
    corpus = open_indexed(f"{config.output_prefix}_messages_document")
    labels, tokenizer = open_labels(corpus), load_tokenizer("huggingface", config.tokenizer_path)
    found = []
    for number in range(corpus.documents):
        ids, flags = corpus.document(number), labels.document(number) & LABEL
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(flags)) + 1)
        found.append([tokenizer.decode(ids[run].tolist()) for run in runs if flags[run[0]]])
    return found


def skipped(config: PrepareConfig) -> list[tuple[int, str]]:
    lines = Path(f"{config.output_prefix}_skipped.jsonl").read_text().splitlines()
    return [(row["row"], row["reason"]) for row in map(json.loads, lines)]


def test_bad_rows_are_listed_and_good_ones_labelled(job: Callable[..., PrepareConfig]) -> None:
    rows = [
        {**exchange("Hi", "Hello", "And you?", "Fine"), "id": 3},
        exchange("Hi"),
        {"text": "plain"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"instruction": "Add", "input": "1+1", "output": "2"},
        exchange("Hi", LONG),
    ]
    config = job(rows)
    text = prepare(config, "sft")
    assert labelled(config) == [["Hello", "Fine"], ["2"]]
    assert "2 conversations, " in text and "6 documents in = 2 written + 4 skipped" in text
    reasons = dict(skipped(config))
    assert list(reasons) == [2, 3, 4, 6]
    assert "the assistant says nothing" in reasons[2] and "no conversation is found" in reasons[3]
    assert reasons[4] == "the row is a pair where a conversation was expected"
    assert "tokens, more than 80" in reasons[6]
    with pytest.raises(DataError, match=r"rows.jsonl, row 2, byte \d+: the assistant says nothing"):
        prepare(dataclasses.replace(config, on_bad_row="stop"), "sft")


def test_truncation(job: Callable[..., PrepareConfig]) -> None:
    rows = [exchange("Hi", LONG, "And you?", "Fine"), exchange("Hi", LONG), exchange(LONG, "ok")]
    end = load_tokenizer("huggingface", job([]).tokenizer_path).control_id("<|im_end|>")
    texts, last = {}, {}
    for policy in ("drop", "oldest_turns", "answer", "answer_with_end"):
        config = job([*rows, exchange("Hi", "Hello")], truncation=policy)
        text = prepare(config, "sft")
        texts[policy] = labelled(config)
        corpus = open_indexed(f"{config.output_prefix}_messages_document")
        assert corpus.sizes.max() <= 80
        flags = [open_labels(corpus).document(number) for number in range(corpus.documents)]
        shortened = sum(bool(flag[-1] & SHORTENED) for flag in flags)
        assert f"{shortened} shortened ({policy})" in text and not any((flag[:-1] & SHORTENED).any() for flag in flags)
        last[policy] = [int(corpus.document(number)[-1]) == end for number in range(corpus.documents)]
    assert texts["drop"] == [["Hello"]]
    assert texts["oldest_turns"] == [["Fine"], ["Hello"]]
    for policy in ("answer", "answer_with_end"):
        assert [len(runs) for runs in texts[policy]] == [1, 1, 1] and texts[policy][0][0].startswith("word word")
        assert last[policy][:2] == [policy == "answer_with_end"] * 2
    assert (3, "no word of the assistant is left") in skipped(job([]))


def test_pairs(job: Callable[..., PrepareConfig]) -> None:
    rows = [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"chosen": exchange("a", "b", "c", "yes")["messages"], "rejected": exchange("a", "b", "c", "no")["messages"]},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": LONG, "rejected": "b"},
        exchange("Hi", "Hello"),
    ]
    config = job(rows, max_tokens=160)
    prepare(config, "pairs")
    assert labelled(config) == [["good", "bad"], ["yes", "no"]]  # an earlier answer is a part of the prompt
    assert [row for row, _ in skipped(config)] == [3, 4, 5]
    labels = open_labels(open_indexed(f"{config.output_prefix}_messages_document"))
    for number in range(2):
        second = np.flatnonzero(labels.document(number) & SECOND)
        assert len(second) == 1 and 0 < second[0] < labels.sizes[number]


def test_all_tokens_and_a_validation_split(job: Callable[..., PrepareConfig]) -> None:
    config = job([exchange(f"Hi {number}", "Hello") for number in range(20)], train_on="all", valid_fraction=0.3)
    prepare(config, "sft")
    sizes = []
    for split in ("train", "valid"):
        corpus = open_indexed(f"{config.output_prefix}_{split}_messages_document")
        assert set(open_labels(corpus).flat.tolist()) == {LABEL}
        sizes.append(corpus.documents)
    assert sum(sizes) == 20 and all(sizes)


def test_workers_resume_and_shards_give_the_same(job: Callable[..., PrepareConfig], monkeypatch: Any) -> None:
    from steel_megatron.data.preprocessing import pipeline

    rows = [exchange(f"Question {number}", "Answer " * (number % 9 + 1)) for number in range(300)]
    config = job(rows)
    prepare(config, "sft")
    prefix = f"{config.output_prefix}_messages_document"
    content = open_indexed(prefix).manifest["content"]  # type: ignore[index]
    labels = open_labels(open_indexed(prefix)).manifest["content"]  # type: ignore[index]
    original = pipeline.preprocess
    monkeypatch.setattr(
        "steel_megatron.data.preprocessing.chat.preprocess",
        lambda job, chat: original(job, ChunkSizes(chunk_bytes=2048, segment_bytes=4096), chat),
    )
    prepare(dataclasses.replace(config, workers=2), "sft")
    assert open_indexed(prefix).manifest["content"] == content  # type: ignore[index]
    assert open_labels(open_indexed(prefix)).manifest["content"] == labels  # type: ignore[index]
    assert verify(prefix).checksums


def test_a_ledger_reads_whole_conversations(job: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    config = job([exchange(f"Question {number}", "Answer " * (number % 9 + 1)) for number in range(40)])
    prepare(config, "sft")
    prefix = f"{config.output_prefix}_messages_document"
    ledger = Ledger.create([prefix], 128, 1, tmp_path, epochs=2)
    samples = LedgerSamples(ledger)
    count = ledger.history.samples(0)
    for epoch in range(2):
        documents: list[int] = []
        for number in range(epoch * count, (epoch + 1) * count):
            keys = {key for key in samples.whole(number).documents.tolist() if key >= 0}
            documents += [document_of(key)[1] for key in keys]
            assert sorted(span.document for span in samples.documents(number)) == sorted(
                document_of(key)[1] for key in keys
            )
        assert sorted(documents) == list(range(40))
    record = ledger.history.corpora[0]
    assert record.whole_samples == count and record.labels is not None
    assert Ledger.parse(json.dumps(to_json(ledger)).encode(), "x").history == ledger.history
    # Other labels for the same tokens are another corpus.
    prepare(dataclasses.replace(config, train_on="all"), "sft")
    with pytest.raises(DataError, match="has changed since it was added to the ledger: labels of"):
        LedgerSamples(ledger)
    other = Ledger.create([prefix], 128, 1, tmp_path, epochs=2)
    assert other.history.fingerprint(1) != ledger.history.fingerprint(1)
    Path(f"{config.output_prefix}_labels_document.idx").unlink()
    with pytest.raises(DataError, match=r"the labels of .* cannot be read"):
        Ledger.create([prefix], 128, 1, tmp_path)


def to_json(ledger: Ledger) -> dict[str, Any]:
    from steel_megatron.data.ledger.ledger import dumps

    found: dict[str, Any] = json.loads(dumps(ledger.history))
    return found


def test_inspect(job: Callable[..., PrepareConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job([exchange("Hi <b>", "Hello")])
    assert main(["sft", "prepare", *_as_words(config)]) == 0
    prefix, page = f"{config.output_prefix}_messages_document", tmp_path / "page.html"
    words = ["sft", "inspect", prefix, "--tokenizer_path", config.tokenizer_path, "--html", str(page)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Hi <b><|im_end|>" in shown and "[[Hello<|im_end|>]]" in shown and "rows.jsonl, row 1" in shown
    assert "<mark>Hello&lt;|im_end|&gt;</mark>" in page.read_text() and "Hi &lt;b&gt;" in page.read_text()
    assert main([*words, "--document", "7"]) == 2
    assert "document is 7; " in capsys.readouterr().err


def _as_words(config: PrepareConfig) -> list[str]:
    return ["--inputs", *config.inputs, "--output_prefix", config.output_prefix, "--max_tokens", "80",
            "--tokenizer_path", config.tokenizer_path]  # fmt: skip


def test_settings_that_are_refused(job: Callable[..., PrepareConfig]) -> None:
    with pytest.raises(ConfigError, match="truncation"):
        job([], truncation="middle")
    with pytest.raises(ConfigError, match="max_tokens"):
        job([], max_tokens=1)


@pytest.mark.parametrize(("kind", "what"), [("sft", "conversation"), ("pairs", "pair")])
def test_inputs_that_hold_nothing(kind: Any, what: str, job: Callable[..., PrepareConfig]) -> None:
    with pytest.raises(DataError, match=rf"the inputs hold no {what} \(1 rows were skipped\)"):
        prepare(job([{"foo": 1}]), kind)
