"""The published text recipe on samples: on made ones, exactly what it should drop and why."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.data.cleaning.test_pipeline import rows
from tests.data.configured import clean_corpus
from tests.data.conftest import KINDS, REAL, REAL_LINES
from tests.fixtures.texts import SYSTEM, corpus

RECIPE = Path(__file__).resolve().parents[3] / "examples" / "steel_1b" / "clean_text.yaml"


def good_texts(count: int) -> list[str]:
    """Texts that every number of the published recipe keeps: three sentences of 15 to 60 characters, a line each."""
    texts = [*corpus("facts_zh"), *corpus("explanations_zh")]
    found = dict.fromkeys(
        f"{one}。" for text in texts for one in re.findall("[\u4e00-\u9fff，、；：]{15,60}(?=。)", text)
    )
    threes = ["\n".join(three) for three in zip(*[iter(found)] * 3, strict=False)]
    good = [text for text in threes if 0.8 < sum(map(str.isalnum, text)) / len(text) < 0.89]
    assert len(good) >= count
    return good[:count]


def test_the_published_recipe_drops_what_it_should(tmp_path: Path) -> None:
    """Twenty good texts a source are kept; of the others, each falls to the first operator that it fails."""
    good = good_texts(60)
    bad = {
        "汉字之间没有任何标点" * 2 + "所以这一行全是字": "alphanumeric_filter",  # above 0.9
        "太短，了。": "average_line_length_filter",  # below 10
        "".join(good[1:5]).replace("\n", ""): "average_line_length_filter",  # above 150
        "哈，" * 20: "character_repetition_filter",  # two kinds of n-grams, half of them one kind
        "".join(good[:25]).replace("\n", "")[:1050] + "\n" + "\n".join(good[40:44]): "maximum_line_length_filter",
        "甲、乙，丙；丁、戊，己；庚、辛，壬；癸、子，丑；寅、卯，辰；巳。": "special_characters_filter",
        "我来到北京，清华大学。": "words_num_filter",  # four words
        good[7]: "document_deduplicator",
    }
    halves = [tuple(text.split("\n", 1)) for text in good]
    files = {
        "wanjuan": [{"content": text} for text in [*good[:20], *bad]],
        "belle": [{"instruction": asked, "output": answer} for asked, answer in [*halves[20:40], ("好", "行")]],
        "baidu_qa": [{"title": asked, "answer": answer} for asked, answer in [*halves[40:], halves[20]]],
    }
    for source, made in files.items():
        (tmp_path / f"{source}.json").write_text("".join(json.dumps(row) + "\n" for row in made))
    recipe, model = RECIPE.read_text(encoding="utf-8"), "{model: train, max_quantile: 0.95}"
    assert recipe.count(model) == 1
    (tmp_path / "recipe.yaml").write_text(recipe.replace(model, "{model: none}"))  # it drops a share, whatever it is
    sources = [f"{source}={tmp_path}/{source}.json" for source in files]
    result = clean_corpus(tmp_path / "recipe.yaml", sources, tmp_path / "out")
    dropped = {(row["source"], row["row"]): row["operator"] for row in rows(tmp_path / "out" / "quarantine")}
    assert dropped == {
        **{("wanjuan", 21 + place): operator for place, operator in enumerate(bad.values())},
        ("belle", 21): "average_line_length_filter",
        ("baidu_qa", 21): "document_deduplicator",
    }
    assert (result.documents_in, result.documents_kept) == (20 + len(bad) + 21 + 21, 60)
    for source in files:
        kept = rows(tmp_path / "out" / source)
        assert [row["row"] for row in kept] == list(range(1, 21))
        assert [row.get("dialogue", False) for row in kept] == [source != "wanjuan"] * 20
    assert all(row["text"].startswith(SYSTEM) for row in rows(tmp_path / "out" / "belle"))


if "real" in KINDS:

    def test_real_samples(tmp_path: Path) -> None:
        """Some of each real source."""
        sources = []
        for source in ("belle", "baidu_qa", "wanjuan"):
            lines = (REAL / "steel_samples" / REAL_LINES[source]).read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / f"{source}.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
            sources.append(f"{source}={tmp_path}/{source}.jsonl")
        result = clean_corpus(RECIPE, sources, tmp_path / "out")
        assert result.documents_in == 180 and 50 < result.documents_kept < 150
        for row in rows(tmp_path / "out" / "quarantine" / "alphanumeric_filter"):
            assert row["value"] > 0.9
        for row in rows(tmp_path / "out" / "belle"):
            assert row["dialogue"] and row["text"].startswith(SYSTEM)
