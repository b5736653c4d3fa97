"""sft build: every row of the parts is in the result or counted, languages have their shares, and bytes repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from steel_megatron.cli import main
from steel_megatron.config import PrepareConfig
from steel_megatron.data.building.recipe import load_recipe
from steel_megatron.data.preprocessing.chat import prepare
from tests.fixtures.make_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path for path in (ROOT / "examples/steel_1b/sft").glob("*.yaml") if "parts:" in path.read_text())


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], "label": 1}


def question(number: int, **more: Any) -> dict[str, Any]:
    return {"q_main": f"第{number}题", "option_a": "对", "option_b": "错", "std_ans": "A", **more}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    mixed = [chat(f"第{number}个问题是什么？", "我不知道。") for number in range(30)]
    mixed += [chat(f"What is question {number}?", "I do not know.") for number in range(20)]
    write(tmp_path / "mixed.jsonl", [*mixed, chat("空はなぜ青いのですか。", "わかりません。")])
    explained = [question(number, answer_detail="显然。") for number in range(5)]
    write(tmp_path / "exams.jsonl", [*explained, question(6), {"q_main": "填空题", "std_ans": "十"}])
    write(tmp_path / "self.jsonl", [{"prompt": "你是谁？", "completion": "我是{{name}}。"}])
    recipe = {
        "parts": {
            "mixed": {},
            "exams": {"questions": "both"},
            "self": {"inputs": [str(tmp_path / "self.jsonl")], "fill": {"name": "小钢"}, "copies": 3},
        },
        "shares": {"zh": 0.8, "en": 0.2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def build(raw: Path, *more: str, output: str = "chat.jsonl") -> int:
    sources = [f"mixed={raw / 'mixed.jsonl'}", f"exams={raw / 'exams.jsonl'}"]
    words = ["sft", "build", str(raw / "recipe.yaml"), "--output", str(raw / output), "--sources", *sources]
    return main([*words, *more])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_mixture(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(raw) == 0
    said = capsys.readouterr()
    assert "not read are the columns label" in said.err
    assert "55 conversations: zh 44 (80.0%), en 11 (20.0%)" in said.out
    rows = rows_of(raw / "chat.jsonl")
    assert [row["part"] for row in rows].count("exams") == 11
    assert [row["messages"][1]["content"] for row in rows if row["part"] == "self"] == ["我是小钢。"] * 3
    english = [row["messages"][0]["content"] for row in rows if "What" in row["messages"][0]["content"]]
    assert len(set(english)) == 11 and english != [f"What is question {number}?" for number in range(11)]
    report = yaml.safe_load((raw / "chat.report.yaml").read_text("utf-8"))
    assert report["written"] == {"zh": 44, "en": 11} and report["skipped"] == []
    assert report["parts"]["mixed"]["left_out"] == {"share of en": 9, "share of other": 1}
    assert report["parts"]["exams"]["left_out"] == {"no multiple-choice question": 1}
    assert [report["parts"][name]["rows"] for name in ("mixed", "exams", "self")] == [51, 7, 1]
    # The same bytes again; others by another seed.
    assert build(raw, output="again.jsonl") == 0
    assert (raw / "again.jsonl").read_bytes() == (raw / "chat.jsonl").read_bytes()
    recipe = (raw / "recipe.yaml").read_text("utf-8")
    (raw / "recipe.yaml").write_text(f"{recipe}seed: 1\n", encoding="utf-8")
    assert build(raw, output="other.jsonl") == 0
    assert (raw / "other.jsonl").read_bytes() != (raw / "chat.jsonl").read_bytes()
    # sft prepare reads all of it.
    make_tokenizer(raw / "tokenizer")
    names = {"output_prefix": str(raw / "corpus"), "tokenizer_path": str(raw / "tokenizer"), "max_tokens": 200}
    assert "55 conversations" in prepare(PrepareConfig(inputs=[str(raw / "chat.jsonl")], **names), "sft")


def test_languages_and_explanations_alone(raw: Path) -> None:
    recipe = {"parts": {"mixed": {"language": "zh"}, "exams": {"questions": "explained"}}}
    (raw / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert build(raw) == 0
    report = yaml.safe_load((raw / "chat.report.yaml").read_text("utf-8"))
    assert report["parts"]["mixed"]["left_out"] == {"language en": 20, "language other": 1}
    assert report["parts"]["exams"]["left_out"] == {"no explanation": 1, "no multiple-choice question": 1}
    assert report["written"] == {"zh": 35}


def test_shares_shorten_the_language_that_is_too_much(raw: Path) -> None:
    recipe = yaml.safe_load((raw / "recipe.yaml").read_text("utf-8"))
    (raw / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "shares": {"zh": 0.5, "en": 0.5}}), encoding="utf-8")
    assert build(raw) == 0
    assert yaml.safe_load((raw / "chat.report.yaml").read_text("utf-8"))["written"] == {"zh": 20, "en": 20}


def test_pairs(raw: Path) -> None:
    pairs = [{"prompt": f"第{number}题？", "chosen": "对。", "rejected": "错。"} for number in range(8)]
    pairs += [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(8)]
    write(raw / "pairs.jsonl", pairs)
    recipe = ROOT / "examples/steel_1b/sft/preferences.yaml"
    sources = [f"ultrafeedback_{name}={raw / 'pairs.jsonl'}" for name in ("zh", "en")]
    assert main(["sft", "build", str(recipe), "--output", str(raw / "p.jsonl"), "--sources", *sources]) == 0
    rows = rows_of(raw / "p.jsonl")
    assert len(rows) == 10 and all(set(row) == {"chosen", "rejected", "part"} for row in rows)
    make_tokenizer(raw / "tokenizer")
    names = {"output_prefix": str(raw / "corpus"), "tokenizer_path": str(raw / "tokenizer"), "max_tokens": 200}
    assert "10 pairs" in prepare(PrepareConfig(inputs=[str(raw / "p.jsonl")], **names), "pairs")


def test_bad_rows(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(raw / "exams.jsonl", [question(1), question(2, std_ans="X")])
    assert build(raw) == 2
    assert "exams.jsonl, row 2, byte" in (said := capsys.readouterr().err) and "'X' names none of the options" in said
    assert not list(raw.glob("chat*"))
    assert build(raw, "--on_bad_row", "skip") == 0
    report = yaml.safe_load((raw / "chat.report.yaml").read_text("utf-8"))
    assert report["parts"]["exams"]["left_out"] == {"bad row": 1} and report["parts"]["exams"]["rows"] == 2
    assert [(one["row"], one["file"]) for one in report["skipped"]] == [(2, str(raw / "exams.jsonl"))]
    assert build(raw) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parts": {"mixed": {"language": "fr"}}}, "part mixed: .*language is 'fr'"),
        ({"parts": {"mixed": {"copies": 0}}}, "part mixed: .*copies is 0"),
        ({"parts": {"mixed": {"kind": 1}}}, "part mixed: unknown key 'kind'"),
        ({"parts": {"mixed": 3}}, "part mixed: 3 is not"),
        ({"parts": {"mixed": {}, "more": {}}}, "no inputs are given for more"),
        ({"parts": {}}, "holds no recipe"),
        ({"shares": {"zh": 0.8}}, "they must be at least 0, and 1 together"),
        ({"shares": {"fr": 1.0}}, "shares is"),
        ({"shares": {"zh": 0.5, "other": 0.5}, "parts": {"mixed": {"language": "zh"}}}, "no conversation is in it"),
        ({"parts": {"mixed": {"fill": {"x": "y"}}, "self": {"fill": {"x": "y"}}}}, "no value for {{name}}"),
    ],
)
def test_wrong_recipes(raw: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str) -> None:
    import re

    recipe = {"parts": {"mixed": {}}, **changed}
    (raw / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    sources = [f"{name}={raw / name}.jsonl" for name in recipe["parts"] if name in ("mixed", "self")]
    output = ["--output", str(raw / "chat.jsonl")]
    assert main(["sft", "build", str(raw / "recipe.yaml"), *output, *(["--sources", *sources] if sources else [])]) == 2
    assert re.search(message, said := capsys.readouterr().err), said
    assert not list(raw.glob("chat*"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_paper(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parts = yaml.safe_load(path.read_text("utf-8"))["parts"]
    recipe = load_recipe(path, [f"{name}=raw/{name}" for name in parts])
    assert list(recipe.parts) == list(parts) and all(part.inputs for part in recipe.parts.values())
    assert len(RECIPES) == 7
