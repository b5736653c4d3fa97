"""Overlap of benchmarks with corpora: what is found, what is not, and in which documents."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from steel_megatron.cli import main
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.evaluation import contamination
from steel_megatron.evaluation.contamination import Item, Ngrams, find_overlaps, units_of
from tests.data.configured import preprocess
from tests.evaluation.benchmarks import write_cmmlu, write_csv
from tests.fixtures.make_tokenizer import make_tokenizer

N = 13
ENGLISH = "Which of the five planets that old astronomers knew takes almost twelve years for one round of the sun"
CHINESE = "古代天文学家认识的五颗行星中，哪一颗绕太阳一周几乎需要十二年的时间？"
OTHER = " ".join(f"filler{number}" for number in range(40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def corpus(folder: Path, texts: list[str], tokenizer: Path) -> str:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    preprocess([str(folder / "documents.jsonl")], folder / "corpus", "huggingface", tokenizer)
    return str(folder / "corpus_text_document")


def test_units_are_words_and_characters() -> None:
    assert units_of("It's 水的 沸点, ＡＢＣ_x 100°C") == ["it", "s", "水", "的", "沸", "点", "abc", "x", "100", "c"]


def test_what_is_found(tmp_path: Path, tokenizer: Path) -> None:
    words, characters = units_of(ENGLISH), units_of(CHINESE)
    part = " ".join(words[2 : 2 + N])
    texts = [
        OTHER,
        f"{OTHER}. {part.upper()}! {OTHER}",  # one n-gram
        " ".join(words[2 : 1 + N]) + " but otherwise",  # a word less
        OTHER + " " + " ".join(words[: N - 3]),
        " ".join(words[N - 3 :][: N - 1]) + " " + OTHER,  # the two together would hold n-grams
        "，".join(characters),  # other punctuation
        ENGLISH + CHINESE,
    ]
    items = [
        Item("en", 1, ENGLISH, "Jupiter"),
        Item("zh", 1, CHINESE, "木星"),
        Item("zh", 2, "太短", "短"),
        Item("zh", 3, "问题很短", CHINESE),
        Item("en", 2, "no " * N, "no"),
    ]
    prefix = corpus(tmp_path / "a", texts, tokenizer)
    found = find_overlaps(items, [prefix], load_tokenizer("huggingface", tokenizer))
    assert found.too_short == [items[2]] and found.documents == len(texts)
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    assert set(found.found) == {items[0], items[1], items[3]}
    english, chinese = found.overlaps[items[0]], found.overlaps[items[1]]
    assert [(one.document, one.overlap) for one in english.largest] == [(6, len(words) - N + 1), (1, 1)]
    assert english.largest[1].excerpt == part and english.largest[1].origin.endswith("documents.jsonl, row 2")
    assert english.documents == 2 and english.share("question") == 1 and english.share("answer") == 0
    assert [one.document for one in chinese.largest] == [6, 5]
    assert chinese.largest[0].excerpt == "".join(characters[:N])
    assert found.overlaps[items[3]].share("answer") == 1 and not found.overlaps[items[4]].found
    assert found.by_task()["zh"] == {"items": 3, "compared": 2, "question": 1, "answer": 1}
    text = found.to_text()
    assert max(map(len, text.splitlines())) <= 80 or str(tmp_path) in text
    assert "3 of 4 compared items overlap" in text


def test_batches_and_lists_are_bounded(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{OTHER} {ENGLISH}" if number % 3 == 0 else OTHER for number in range(30)]
    prefix = corpus(tmp_path / "a", texts, tokenizer)
    items = [Item("en", 1, ENGLISH, "Jupiter")]
    own = load_tokenizer("huggingface", tokenizer)
    expected = find_overlaps(items, [prefix], own)
    assert expected.overlaps[items[0]].documents == 10 and len(expected.overlaps[items[0]].largest) == 5
    monkeypatch.setattr(contamination, "_AT_ONCE", 70)
    monkeypatch.setattr(contamination, "_KNOWN_UNITS", 10)
    assert find_overlaps(items, [prefix], own).to_dict() == expected.to_dict()


def test_hashes_are_those_of_each_ngram() -> None:
    units = [random.Random(0).choice("abcd") for _ in range(50)]
    hashes = Ngrams(5).of(units)
    assert len(hashes) == 46 and len(Ngrams(5).of(units[:4])) == 0
    by_text: dict[str, set[int]] = {}
    for place, value in enumerate(hashes.tolist()):
        by_text.setdefault(" ".join(units[place : place + 5]), set()).add(value)
    assert all(len(values) == 1 for values in by_text.values())
    assert len(set().union(*by_text.values())) == len(by_text)


def test_the_command(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = [["", "Question", *"ABCD", "Answer"], ["0", CHINESE, "火星", "木星", "土星", "金星", "B"]]
    write_cmmlu(tmp_path / "data" / "cmmlu", ["logical"])
    write_csv(tmp_path / "data" / "cmmlu" / "test" / "arts.csv", head)
    arguments = ["contamination", "--data", str(tmp_path / "data"), "--tokenizer_path", str(tokenizer)]
    clean = corpus(tmp_path / "clean", [OTHER], tokenizer)
    dirty = corpus(tmp_path / "dirty", [OTHER, CHINESE], tokenizer)
    assert main([*arguments, "--tasks", "cmmlu_arts", "--corpora", clean]) == 0
    assert "no item overlaps" in capsys.readouterr().out
    report = tmp_path / "report.json"
    tasks = ["cmmlu_arts", "cmmlu_logical"]
    assert main([*arguments, "--tasks", *tasks, "--corpora", clean, dirty, "--json", str(report)]) == 1
    assert "1 of 1 compared items overlap" in capsys.readouterr().out
    (item,) = json.loads(report.read_text())["items"]
    assert (item["task"], item["question"], item["answer"], item["question_share"]) == (
        "cmmlu_arts",
        CHINESE,
        "木星",
        1,
    )
    assert item["largest"][0]["corpus"] == dirty and item["largest"][0]["document"] == 1


def test_bad_input(tmp_path: Path, tokenizer: Path) -> None:
    own = load_tokenizer("huggingface", tokenizer)
    with pytest.raises(ConfigError, match="ngram = 1 must be at least 2"):
        find_overlaps([], ["x"], own, 1)
    with pytest.raises(DataError, match="x"):
        find_overlaps([], [str(tmp_path / "x")], own)
    prefix = corpus(tmp_path / "a", [OTHER], tokenizer)
    make_tokenizer(tmp_path / "other")
    merges = (tmp_path / "other" / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other" / "merges.txt").write_text("\n".join(merges[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="was made with another tokenizer"):
        find_overlaps([], [prefix], load_tokenizer("huggingface", tmp_path / "other"))
