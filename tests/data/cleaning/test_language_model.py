"""The character model: probabilities that sum to one, sense, and damage."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from steel_megatron.data.cleaning.filters import Perplexity, Resources
from steel_megatron.data.cleaning.language_model import HalfModel, LanguageModel, half_of
from steel_megatron.data.cleaning.steps import Rejection, operate
from steel_megatron.data.cleaning.texts import DocumentText
from steel_megatron.errors import DataError
from tests.data.conftest import make_texts

TEXTS = make_texts(400)


def of_one(texts: list[str]) -> list[tuple[str, str]]:
    """Texts of one source."""
    return [("text", text) for text in texts]


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("history", ["", "b", "abab", "aaa", "?", "ab?c"])
def test_probabilities_sum_to_one(order: int, history: str) -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choices("abc", (5, 3, 1), k=draw.randint(1, 9))) for _ in range(50)] + ["xay", "z"]
    model = HalfModel.train(texts, order)
    assert sorted(map(chr, model.alphabet)) == ["a", "b", "c"] and model.unknown_kinds == 3

    def probability(character: str) -> float:
        return float(np.exp(model.log_probabilities(history + character)[len(history)]))

    ends = float(np.exp(model.log_probabilities(history)[-1]))
    assert ends + sum(map(probability, "abc")) + model.unknown_kinds * probability("?") == pytest.approx(1, abs=1e-5)


def test_bigrams_by_hand() -> None:
    """Kneser-Ney on "ab" x 3 and "b": the discounts are clamped, the rest is the textbook's sum."""
    model = HalfModel.train(["ab", "ab", "ab", "b"], 2)
    # Bigrams: Ba 3, ab 3, bE 4, Bb 1; kinds n1 = 1, n2 = 0 -> 1, so y = 1/3; D1 = 1 - 2/3 = 1/3; n3 = 2, n4 = 1.
    # D3+ = 3 - 4 y n4 / n3 = 3 - 2/3; clamped at 2.9: 7/3. Continuation counts: a 1, b 2, E 1.
    # Of these n1 = 2, n2 = 1 -> y = 1/2, D1 = 1 - 2 y n2 / n1 = 1/2, D2 = 2 - 3 y n3 / n2 = 1/2.
    left = (0.5 + 0.5 + 0.5) / 4
    unigram = {"a": 0.5 / 4 + left / 4, "b": 1.5 / 4 + left / 4}
    from_begin = (7 / 3 + 1 / 3) / 4
    assert np.exp(model.log_probabilities("a")[0]) == pytest.approx((3 - 7 / 3) / 4 + from_begin * unigram["a"])
    assert np.exp(model.log_probabilities("b")[0]) == pytest.approx((1 - 1 / 3) / 4 + from_begin * unigram["b"])


def test_sense_is_less_perplexing_than_nonsense(tmp_path: Path) -> None:
    model = LanguageModel.train(of_one(TEXTS))
    unseen = make_texts(30, seed=9)
    draw = random.Random(0)
    for text in unseen:
        shuffled = "".join(draw.sample(text, len(text)))
        assert model.perplexity(text) < model.perplexity(shuffled)
    assert model.quantile(0.0) == min(map(model.perplexity, TEXTS))
    assert model.quantile(1.0) == max(map(model.perplexity, TEXTS))
    above = sum(model.perplexity(text) > model.quantile(0.9) for text in TEXTS)
    assert 0.08 * len(TEXTS) <= above <= 0.12 * len(TEXTS)
    model.save(tmp_path / "model")
    again = LanguageModel.load(tmp_path / "model")
    assert [again.perplexity(text) for text in unseen] == [model.perplexity(text) for text in unseen]
    assert again.quantile(0.5) == model.quantile(0.5)


def test_a_text_is_scored_by_the_half_that_did_not_see_it() -> None:
    text = "这一句话只出现一次，谁也没有说过第二遍！"
    texts = [*TEXTS, text]
    more = [*texts, *_other_half(text)]
    assert LanguageModel.train(of_one(texts)).perplexity(text) > LanguageModel.train(of_one(more)).perplexity(text)


def _other_half(text: str) -> list[str]:
    """Texts with the same words in the half that scores it."""
    candidates = [text + str(number) for number in range(50)]
    return [candidate for candidate in candidates if half_of(candidate) != half_of(text)]


def test_each_source_has_its_own_quantiles(tmp_path: Path) -> None:
    """Classical Chinese is strange among web pages; of its own texts it loses only the strangest."""
    draw = random.Random(2)
    old = ["".join(draw.choices("之乎者也矣焉哉其而则以于为何若乃", k=40)) for _ in range(60)]
    model = LanguageModel.train([*(("web", text) for text in TEXTS), *(("classics", text) for text in old)])
    model.save(tmp_path / "model")
    model = LanguageModel.load(tmp_path / "model")

    def lost(texts: list[str], source: str | None) -> int:
        limits = Perplexity(max_quantile=0.95), Resources(language_model=str(tmp_path / "model"), source=source)
        return sum(isinstance(operate(DocumentText(text), *limits), Rejection) for text in texts)

    assert lost(old, "classics") == 3 and 15 <= lost(TEXTS, "web") <= 25
    assert lost(old, None) > 20
    assert model.quantile(0.95, "unheard of") == model.quantile(0.95)
    assert model.quantile(0.95, "web") < model.quantile(0.95) < model.quantile(0.95, "classics")


def test_too_few_texts() -> None:
    with pytest.raises(DataError, match=r"there are 1 texts .* too few.*model: none"):
        LanguageModel.train([("text", "x")])


@pytest.mark.parametrize("damage", ["missing", "json", "format", "array", "truncated"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    LanguageModel.train(of_one(TEXTS[:50])).save(tmp_path)
    about, array = tmp_path / "model.json", tmp_path / "1_2_grams.npy"
    if damage == "missing":
        about.unlink()
    elif damage == "json":
        about.write_text("{")
    elif damage == "format":
        about.write_text(json.dumps({"format": "other"}))
    elif damage == "array":
        array.unlink()
    else:
        array.write_bytes(array.read_bytes()[:200])
    with pytest.raises(DataError, match="no language model that can be read"):
        LanguageModel.load(tmp_path)
