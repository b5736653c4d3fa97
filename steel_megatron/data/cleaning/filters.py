"""Operators that keep or drop a document by one number. Names and meaning are data-juicer's; docs/cleaning.md lists
where they differ.

Every filter is a frozen dataclass whose fields are its parameters in a recipe. It measures a :class:`MeasuredText` and
keeps it when the number is within its bounds, both included.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from steel_megatron.data.cleaning.language_model import LanguageModel
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import ConfigError

Tokenization = Literal["jieba", "space", "tokenizer"]


class MeasuredText:
    """A text under measurement, with what several filters need of it.

    Args:
        text: the text.
        resources: what needs to be loaded for some filters.
    """

    def __init__(self, text: str, resources: Resources) -> None:
        self.text, self.resources = text, resources

    @functools.cached_property
    def lines(self) -> list[str]:
        """The lines without their ends."""
        return self.text.splitlines()

    @functools.cached_property
    def jieba_words(self) -> list[str]:
        """Words by jieba's dictionary, in its implementation in Rust; no spaces among them."""
        import rjieba

        return [word for word in rjieba.cut(self.text) if not word.isspace()]

    def words(self, tokenization: Tokenization) -> Sequence[Hashable]:
        """The words (or ids of tokens) that hold a letter, lower case except for ids."""
        if tokenization == "tokenizer":
            return self.resources.word_tokens(self.text)
        words = self.jieba_words if tokenization == "jieba" else map(_bare, self.text.split())
        return [word.lower() for word in words if not all(map(is_special, word))]


class Resources:
    """What some filters need loaded, loaded when the first of them asks.

    Args:
        tokenizer: folder of a Hugging Face tokenizer, or a SentencePiece ``.model`` file.
        language_model: folder of a :class:`LanguageModel`.
        source: name of the source whose documents are measured.
    """

    def __init__(
        self, tokenizer: str | None = None, language_model: str | None = None, source: str | None = None
    ) -> None:
        self.source = source
        self._tokenizer_path, self._language_model_path = tokenizer, language_model
        self._has_letters: dict[int, bool] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        assert self._tokenizer_path is not None, "the recipe was checked for it"
        return tokenizer_at(self._tokenizer_path)

    @functools.cached_property
    def language_model(self) -> LanguageModel:
        """The language model."""
        assert self._language_model_path is not None, "the recipe was checked for it"
        return LanguageModel.load(Path(self._language_model_path))

    def word_tokens(self, text: str) -> list[int]:
        """The ids of a text's tokens that are more than special characters; parts of a character count."""
        return [token for token in self.tokenizer.encode(text) if self._is_word(token)]

    def _is_word(self, token: int) -> bool:
        if token not in self._has_letters:
            # A part of a character decodes to the replacement character, which is special by itself.
            pieces = self.tokenizer.decode([token])
            self._has_letters[token] = "\ufffd" in pieces or not all(map(is_special, pieces))
        return self._has_letters[token]


@functools.lru_cache(maxsize=2)
def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face, or in a SentencePiece ``.model`` file.

    Raises:
        DataError: there is none.
    """
    return load_tokenizer("huggingface" if Path(path).is_dir() else "sentencepiece", path)


@functools.lru_cache(maxsize=1 << 16)
def is_special(character: str) -> bool:
    """Whether a character is neither a letter, nor a mark on one, nor a number of other than ASCII digits.

    Punctuation, symbols (emoji among them), spaces, controls and the digits 0-9 are special.
    """
    category = unicodedata.category(character)
    return category[0] in "PSZC" or (character.isdecimal() and character.isascii()) or category == "No"


def _bare(word: str) -> str:
    """A word without the special characters at its ends."""
    letters = [place for place, character in enumerate(word) if not is_special(character)]
    return word[letters[0] : letters[-1] + 1] if letters else ""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """An operator that keeps or drops a document."""

    name: ClassVar[str]
    measured: ClassVar[str]
    """What the number is, for reports."""

    def bounds(self, resources: Resources) -> tuple[float, float]:
        """The least and the greatest number that is kept."""
        raise NotImplementedError

    def measure(self, sample: MeasuredText) -> float:
        """The number of a text."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        low, high = self.bounds(Resources())
        if not low <= high:
            raise ConfigError(f"the least value kept, {low}, is above the greatest, {high}")


@dataclass(frozen=True, kw_only=True)
class _RatioFilter(Filter):
    min_ratio: float = 0.0
    max_ratio: float = math.inf

    def bounds(self, resources: Resources) -> tuple[float, float]:
        return self.min_ratio, self.max_ratio


@dataclass(frozen=True, kw_only=True)
class _LengthFilter(Filter):
    min_len: int = 0
    max_len: float = math.inf

    def bounds(self, resources: Resources) -> tuple[float, float]:
        return self.min_len, self.max_len


@dataclass(frozen=True, kw_only=True)
class Alphanumeric(_RatioFilter):
    """Letters and numbers per character; with ``tokenization``, letters per token of the recipe's tokenizer."""

    name = "alphanumeric_filter"
    measured = "letters and numbers per character, or letters per token"
    tokenization: bool = False

    def measure(self, sample: MeasuredText) -> float:
        if self.tokenization:
            return _ratio(sum(map(str.isalpha, sample.text)), len(sample.resources.tokenizer.encode(sample.text)))
        return _ratio(sum(map(str.isalnum, sample.text)), len(sample.text))


@dataclass(frozen=True, kw_only=True)
class AverageLineLength(_LengthFilter):
    """Characters per line; blank lines count, and line ends count as characters."""

    name = "average_line_length_filter"
    measured = "characters per line"

    def measure(self, sample: MeasuredText) -> float:
        return _ratio(len(sample.text), len(sample.lines))


@dataclass(frozen=True, kw_only=True)
class CharacterRepetition(_RatioFilter):
    """Share of the most frequent character n-grams: sqrt(kinds of n-grams) kinds, if so many occur more than once."""

    name = "character_repetition_filter"
    measured = "share of the most frequent repeated character n-grams"
    rep_len: int = 10

    def measure(self, sample: MeasuredText) -> float:
        text, n = sample.text, self.rep_len
        counts = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
        repeated = sum(count > 1 for count in counts)
        return _ratio(sum(counts[: min(math.isqrt(len(counts)), repeated)]), sum(counts))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self.rep_len, "rep_len")


@dataclass(frozen=True, kw_only=True)
class MaximumLineLength(_LengthFilter):
    """Characters of the longest line."""

    name = "maximum_line_length_filter"
    measured = "characters of the longest line"

    def measure(self, sample: MeasuredText) -> float:
        return max(map(len, sample.lines), default=0)


@dataclass(frozen=True, kw_only=True)
class Perplexity(Filter):
    """Perplexity per character under a character n-gram model that has not seen the text.

    ``model`` is ``train`` (on texts of this corpus that pass the other operators), the folder of a model that was
    trained before, or ``none`` to leave the operator out, which the report shows. How high a perplexity is too high
    depends on the model; ``max_quantile`` says it by the share of the model's training texts that stay below: of those
    of the same source, so that each source loses the strangest of its own; of all, for a source it was not trained on.
    """

    name = "perplexity_filter"
    measured = "perplexity per character"
    max_ppl: float = math.inf
    max_quantile: float = 1.0
    model: str = "train"
    train_on: str = ""
    """Names of sources that are held to be clean, separated by commas; all if empty."""
    train_characters: int = 10_000_000
    order: int = 3

    def bounds(self, resources: Resources) -> tuple[float, float]:
        if self.max_quantile == 1:
            return 0.0, self.max_ppl
        return 0.0, min(self.max_ppl, resources.language_model.quantile(self.max_quantile, resources.source))

    def measure(self, sample: MeasuredText) -> float:
        return sample.resources.language_model.perplexity(sample.text)

    def __post_init__(self) -> None:
        _check_positive(self.train_characters, "train_characters")
        if not 0 < self.max_quantile <= 1:
            raise ConfigError(f"max_quantile is {self.max_quantile}; it must be within (0, 1]")
        if not 2 <= self.order <= 8:
            raise ConfigError(f"order is {self.order}; it must be within [2, 8]")


@dataclass(frozen=True, kw_only=True)
class SpecialCharacters(_RatioFilter):
    """Special characters (see :func:`is_special`) per character."""

    name = "special_characters_filter"
    measured = "special characters per character"

    def measure(self, sample: MeasuredText) -> float:
        return _ratio(sum(map(is_special, sample.text)), len(sample.text))


@dataclass(frozen=True, kw_only=True)
class TextLength(_LengthFilter):
    """Characters."""

    name = "text_length_filter"
    measured = "characters"

    def measure(self, sample: MeasuredText) -> float:
        return len(sample.text)


@dataclass(frozen=True, kw_only=True)
class WordsNum(Filter):
    """Words that are more than special characters."""

    name = "words_num_filter"
    measured = "words"
    tokenization: Tokenization = "jieba"
    min_num: int = 0
    max_num: float = math.inf

    def bounds(self, resources: Resources) -> tuple[float, float]:
        return self.min_num, self.max_num

    def measure(self, sample: MeasuredText) -> float:
        return len(sample.words(self.tokenization))


@dataclass(frozen=True, kw_only=True)
class WordRepetition(_RatioFilter):
    """Share of word n-grams that occur more than once; words as in :class:`WordsNum`."""

    name = "word_repetition_filter"
    measured = "share of repeated word n-grams"
    tokenization: Tokenization = "jieba"
    rep_len: int = 10

    def measure(self, sample: MeasuredText) -> float:
        words, n = sample.words(self.tokenization), self.rep_len
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        return _ratio(sum(count for count in counts.values() if count > 1), counts.total())

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self.rep_len, "rep_len")


FILTERS: dict[str, type[Filter]] = {
    kind.name: kind
    for kind in (
        Alphanumeric, AverageLineLength, CharacterRepetition, MaximumLineLength, Perplexity, SpecialCharacters,
        TextLength, WordsNum, WordRepetition,
    )
}  # fmt: skip
"""Every filter by its name in a recipe."""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check_positive(value: int, name: str) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")
