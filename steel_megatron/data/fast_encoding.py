"""gigatoken as an engine: several times as fast as a tokenizer's own library, and only where it gives the same ids.

Only its batch call is used; texts are read from files by this library. Two things keep it exact and bounded:

* gigatoken and ``tokenizers`` carry tables of different Unicode versions, which shows in the order of stacked marks
  and in what counts as a letter. :func:`unsure` finds the texts where that could matter; they are left to the
  tokenizer's own library.
* gigatoken remembers every word it has met, without a limit: about 4 bytes of memory for each byte of new text. The
  object is made anew when the process has grown by :data:`CACHE_BYTES`.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from steel_megatron.data.native import helpers
from steel_megatron.errors import DataError

CACHE_BYTES = 1 << 30
"""Growth of the process after which gigatoken's memory of words is dropped."""

CHECK_TEXTS = (
    "软混合专家（Soft-MoE）把每个词元的加权平均送入专家；2024年，模型有 1,122,922,770 个参数。\n“真的吗？”——“是的！”",
    "  The quick brown fox doesn't jump; naïve café, coöperate.\r\n\r\n\tTabs\tand  spaces  ",
    "I'LL we'Re 'S'T I’ve HTTPServer2go, ǅ ſ K; ﬁ ½ Å ①Ⅷ ﾊﾝｶｸ ３４５ ㍿ İstanbul ΣΑΣ",
    "def f(x):\n    if x == 1:\n        return [i ** 2 for i in range(10)]\n\n\n    # done\n\treturn {'a': 0x1F}\n",
    "😀\U0001f469\u200d\U0001f467 🇨🇳 ▁literal▁▁ ▅ \x00\x7f \ufeff\u200b\ufffd e\u0301 𠮷 12345 aaaaaaaaaaaaaaaaaa",
    "a\u0323\u0307 a\u0307\u0323 \u0344 \u1100\u1161\u11a8 각 नमस्ते สวัสดี عَرَبِيّ שָׁלוֹם \u2126 豈 \ufb2a\u0340 ё\u0301",
    "x\x85y\u2028z\u3000w\xa0v\u1680 \x0b\x0c \r \r\n\n\r \t\n  \n\u3000\u3000段落。\u3000 \n",
    "<s></s><unk><0x0A><|im_start|>user\n<|im_end|><|endoftext|> </s>\n",
    "%E4%BD%A0 \\u4f60 &#20320; 0x7FFFFFFF 1e-10 +86-10 a_b__c/d//e?f=g&h#i@j.k --- *** ... !!!???",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 12 + "长江发源于青藏高原向东流经十一个省市最后注入东海" * 20,
    *("a" + " " * run + "b" for run in range(2, 70)),
    *("a" + "\n" * run + " b" for run in range(2, 12)),
    *("-=" * run + " " + "ab" * run + "a" for run in range(2, 40)),
)
"""Texts on which two engines, or a tokenizer and its exported form, must give the same ids."""

_SLICE = 1 << 20
"""Characters that are looked up at once."""

_FAMILIAR_ASTRAL = (
    (0x1D400, 0x1D7FF),
    (0x1F000, 0x1FAFF),
    (0x20000, 0x2A6D6),
    (0x2A700, 0x2B734),
    (0x2B740, 0x2B81D),
    (0x2B820, 0x2CEA1),
    (0x2CEB0, 0x2EBE0),
)
"""Above U+FFFF: mathematical letters, emoji and ideographs, whose properties are the same in every table."""

FlatIds = tuple[np.ndarray, np.ndarray]
"""Ids of many texts one after another, int32 [tokens], and their lengths, int64 [texts]."""


class EngineProblem(Exception):
    """gigatoken cannot be used; the message says why."""


class EngineMissing(EngineProblem):
    """gigatoken is not installed."""

    def __init__(self) -> None:
        super().__init__("it is not installed (pip install 'steel-megatron[data]')")


class Gigatoken:
    """gigatoken, which encodes special tokens in a text as plain characters and whose memory is bounded.

    Args:
        model: the content of a ``tokenizer.json``.
        cache_bytes: growth of the process after which what it remembers is dropped.

    Raises:
        EngineProblem: it is not installed or cannot run such a tokenizer.
    """

    def __init__(self, model: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._model = _without_special_tokens(model)
        self._cache_bytes = cache_bytes
        self._process = psutil.Process()
        self._renew()

    def _renew(self) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise EngineMissing from error
        self._tokenizer: Any = None  # its memory goes before the next one's is taken
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(self._model)
        except (RuntimeError, ValueError) as error:
            raise EngineProblem(f"it cannot run this tokenizer: {str(error).splitlines()[0]}") from error
        self._base = self._process.memory_info().rss

    def encode_flat(self, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
        """The ids of many texts, or of their UTF-8; uses all cores, but one in a process of multiprocessing."""
        import awkward

        if self._process.memory_info().rss - self._base > self._cache_bytes:
            self._renew()
        encoded = self._tokenizer.encode_batch([text.encode() if isinstance(text, str) else text for text in texts])
        ids = awkward.to_numpy(awkward.flatten(encoded, axis=1))
        return ids.astype(np.uint32, copy=False).view(np.int32), awkward.to_numpy(awkward.num(encoded, axis=1))


def _without_special_tokens(model: str) -> str:
    """A ``tokenizer.json`` that finds no special token in a text, adds none around it and cuts and pads nothing."""
    content = json.loads(model)
    content["added_tokens"] = [token for token in content.get("added_tokens") or () if not token["special"]]
    return json.dumps({**content, "truncation": None, "padding": None, "post_processor": None})


def as_texts(texts: Sequence[str | bytes]) -> list[str]:
    """Texts as strings.

    Raises:
        DataError: one is no valid UTF-8.
    """
    strings = []
    for number, text in enumerate(texts):
        try:
            strings.append(text if isinstance(text, str) else text.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"text {number} of {len(texts)} to encode is not valid UTF-8 "
                f"(byte {error.start} is 0x{error.object[error.start]:02x}: {error.reason})"
            ) from None
    return strings


def refuse_surrogates(text: str) -> None:
    """Refuse what is a string in Python and yet no text.

    Raises:
        DataError: the text holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text to encode holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start} of "
            f"{len(text)}), which is no character; replace it"
        ) from None


def unsure(texts: Sequence[str] | Sequence[bytes]) -> list[int]:
    """The numbers of the texts that hold a character which gigatoken and a tokenizer's library may see differently.

    Args:
        texts: strings, or their UTF-8.

    Raises:
        DataError: a text is no valid UTF-8 or holds a lone surrogate.
    """
    if helpers is None:
        return unsure_by_numpy(as_texts(texts))
    found: list[int] = helpers.holding(list(texts), _unsure_characters().view(np.uint8))
    for number in found:
        text = texts[number]
        if isinstance(text, str):
            refuse_surrogates(text)
        elif not _is_utf8(text):
            as_texts(texts)
    return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def unsure_by_numpy(texts: Sequence[str]) -> list[int]:
    """What :func:`unsure` gives, slower."""
    numbers = [number for number, text in enumerate(texts) if not text.isascii()]
    joined = "".join(texts[number] for number in numbers)
    hits = []
    for start in range(0, len(joined), _SLICE):
        try:
            points = np.frombuffer(joined[start : start + _SLICE].encode("utf-32-le"), dtype=np.uint32)
        except UnicodeEncodeError:
            for text in texts:
                refuse_surrogates(text)
            raise
        hits.append(np.flatnonzero(_unsure_characters().take(points)) + start)
    if not sum(map(len, hits)):
        return []
    ends = np.cumsum([len(texts[number]) for number in numbers])
    return [numbers[at] for at in np.unique(np.searchsorted(ends, np.concatenate(hits), side="right"))]


@functools.cache
def _unsure_characters() -> np.ndarray:
    """Whether a code point is one to be unsure about, bool [0x110000].

    ``tokenizers`` orders marks by tables older than Unicode 11 and knows letters up to Unicode 16; gigatoken follows
    Unicode 17. Unicode 3.2, which Python carries beside its own version, is older than both: what it knows has kept
    its properties ever since. Punctuation and symbols of later versions decide nothing.
    """
    old = unicodedata.ucd_3_2_0
    table = np.ones(0x110000, dtype=bool)
    for low, high in _FAMILIAR_ASTRAL:
        table[low : high + 1] = False
    for point in range(0x10000):
        character = chr(point)
        category, order = unicodedata.category(character), unicodedata.combining(character)
        plain = category[0] not in "LMN" and category != "Cn"
        known = category != "Cn" and old.category(character) != "Cn" and old.combining(character) == order
        table[point] = not (plain or known)
    table[0x9FA6:0xA000] = False  # ideographs that were added to the end of their block
    table[0xD800:0xE000] = True  # surrogates, which are refused
    return table
