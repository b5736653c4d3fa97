"""Recipes: the published ones are read, and whatever is wrong with one is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from steel_megatron.data.cleaning.deduplication import ExactDeduplicator, SimhashDeduplicator
from steel_megatron.data.cleaning.filters import Alphanumeric, AverageLineLength, Perplexity, TextLength
from steel_megatron.data.cleaning.mappers import ChineseConvert
from steel_megatron.data.cleaning.recipe import OPERATORS, load_recipe
from steel_megatron.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "steel_1b"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_text_recipe() -> None:
    recipe = load_recipe(EXAMPLES / "clean_text.yaml", sources=["skypile=a.jsonl"], output="out")
    assert (recipe.kind, recipe.sources, recipe.output) == ("text", ("skypile=a.jsonl",), "out")
    assert recipe.operators[0] == ChineseConvert(mode="t2s")
    assert AverageLineLength(min_len=10, max_len=150) in recipe.operators
    assert recipe.deduplicators() == (ExactDeduplicator(), SimhashDeduplicator(num_blocks=6, hamming_distance=4))
    # 21 operators of the paper, words_num of the released file, and exact copies.
    assert len(recipe.operators) == 23
    assert recipe.perplexity == Perplexity(model="train", max_quantile=0.95)


def test_the_code_recipe() -> None:
    recipe = load_recipe(EXAMPLES / "clean_code.yaml", tokenizer="folder")
    assert (recipe.kind, recipe.tokenizer) == ("code", "folder")
    assert recipe.labels[5:7] == ("alphanumeric_filter", "alphanumeric_filter-2")
    assert recipe.operators[6] == Alphanumeric(tokenization=True, min_ratio=0.546, max_ratio=3.65)
    assert recipe.perplexity is None
    with pytest.raises(ConfigError, match=r"clean_code.yaml: alphanumeric_filter counts tokens; name a tokenizer"):
        load_recipe(EXAMPLES / "clean_code.yaml")


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: text\nsources: [a]\noutput: b\noperators: [text_length_filter]\n")
    assert load_recipe(path).operators == (TextLength(),)
    assert load_recipe(path, sources=None, output="c").output == "c"
    assert load_recipe(path).sources == ("a",)
    empty = load_recipe(write(tmp_path, "kind: text\nsources:\noutput:\noperators: [text_length_filter]\n"))
    assert (empty.sources, empty.output, empty.operators) == ((), None, (TextLength(),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [", "cannot read the recipe"),
        ("- a", "a mapping with the keys kind and operators"),
        ("kind: text\noperators: [x]\nopertors: []", "unknown key 'opertors' in Recipe; it has kind, operators"),
        ("kind: text\noperators: [x]\nopertors:", "unknown key 'opertors' in Recipe; it has kind, operators"),
        ("kind: poem\noperators: [x]", "kind is 'poem'; it must be one of text, code"),
        ("operators: [x]", "kind is missing; it must be text or code"),
        ("kind: text\noperators: []", "operators must be a list .* not empty"),
        ("kind: text\noperators: [text_length_filter]\nsources: a", "sources is 'a'; it must be a list of str"),
        ("kind: text\noperators: [text_length_filter]\nsources: [a, 3]", "sources is .*; it must be a list of str"),
        ("kind: text\noperators: [text_length_filter]\noutput: 3", "output is 3; it must be of type str or null"),
        (
            "kind: text\noperators: [clean_mail]",
            "operator 1: 'clean_mail' is unknown; known are chinese_convert_mapper",
        ),
        ("kind: text\noperators: [{a: 1, b: 2}]", "operator 1: .* is not NAME"),
        ("kind: text\noperators: [text_length_filter: 3]", "operator 1, text_length_filter: 3 is not {PARAMETER"),
        (
            "kind: text\noperators: [clean_email_mapper, text_length_filter: {max: 3}]",
            "operator 2, text_length_filter: unknown key 'max' in TextLength; it has min_len, max_len",
        ),
        ("kind: text\noperators: [text_length_filter: {min_len: ten}]", "min_len is 'ten'; it must be of type int"),
        ("kind: text\noperators: [text_length_filter: {min_len: true}]", "min_len is True; it must be of type int"),
        ("kind: text\noperators: [alphanumeric_filter: {tokenization: 1}]", "tokenization is 1; .* type bool"),
        ("kind: text\noperators: [text_length_filter: {min_len: 3, max_len: 2}]", "least value kept, 3, is above .* 2"),
        ("kind: text\noperators: [chinese_convert_mapper: {mode: x2y}]", "mode is 'x2y'; it must be one of t2s, s2t"),
        (
            "kind: text\noperators: [perplexity_filter: {max_quantile: 0}]",
            r"max_quantile is 0; it must be within \(0, 1\]",
        ),
        (
            "kind: text\noperators: [document_simhash_deduplicator: {hamming_distance: 6}]",
            r"hamming_distance is 6; it must be within \[0, num_blocks - 1\]",
        ),
        (
            "kind: text\noperators: [document_deduplicator, text_length_filter]",
            "text_length_filter stands behind document_deduplicator; deduplicators must be the last",
        ),
        ("kind: text\noperators: [document_deduplicator, document_deduplicator]", "is there twice"),
        (
            "kind: text\noperators: [document_simhash_deduplicator, document_deduplicator]",
            "document_deduplicator stands behind document_simhash_deduplicator; exact copies are found first",
        ),
        ("kind: text\noperators: [perplexity_filter, perplexity_filter]", "is there twice"),
        ("kind: text\noperators: [words_num_filter: {tokenization: tokenizer}]", "words_num_filter counts tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_names_are_those_of_data_juicer_and_documented() -> None:
    page = (EXAMPLES.parents[1] / "docs" / "cleaning.md").read_text(encoding="utf-8")
    for name in OPERATORS:
        assert name.endswith(("_mapper", "_filter", "_deduplicator"))
        assert f"`{name}`" in page
