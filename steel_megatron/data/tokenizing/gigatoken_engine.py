"""gigatoken as an engine: several times as fast as a tokenizer's own library, and only where it gives the same ids.

Only its batch call is used; texts are read from files by this library. Two things keep it exact and bounded:

* gigatoken and ``tokenizers`` carry tables of different Unicode versions, which shows in the order of stacked marks
  and in what counts as a letter. :func:`unsure` finds the texts where that could matter; they are left to the
  tokenizer's own library.
* gigatoken remembers every word it has met, without a limit: up to 6 bytes of memory for each byte of new text. The
  objects of a process are made anew when it has grown by :data:`CACHE_BYTES` for each.
"""

from __future__ import annotations

import copy
import functools
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
import psutil

from steel_megatron.data.native import helpers
from steel_megatron.data.reading.text_batch import SEPARATOR, TextBatch, as_strings

CACHE_BYTES = 1 << 28
"""Growth of the process, for each thread that encodes, after which gigatoken's memory of words is dropped."""

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

# fmt: off
_SETTLED = (
    (0x0221, 0x0377), (0x03CF, 0x052F), (0x0610, 0x06FF), (0x074D, 0x077F), (0x07C0, 0x07FA), (0x0800, 0x082D),
    (0x0840, 0x085B), (0x08A0, 0x08B4), (0x08D4, 0x0980), (0x1022, 0x109D), (0x10F9, 0x1247), (0x1380, 0x138F),
    (0x18B0, 0x18F5), (0x1900, 0x191E), (0x1946, 0x196D), (0x1980, 0x19AB), (0x19B0, 0x19C9), (0x1A00, 0x1A1B),
    (0x1A20, 0x1A5E), (0x1A60, 0x1A7C), (0x1B00, 0x1B4B), (0x1B50, 0x1B73), (0x1B80, 0x1BF3), (0x1C00, 0x1C37),
    (0x1C4D, 0x1C88), (0x1CD0, 0x1CF6), (0x1D00, 0x1DF5), (0x2090, 0x209C), (0x2C00, 0x2C2E), (0x2C30, 0x2C5E),
    (0x2C60, 0x2CF3), (0x2CFD, 0x2D25), (0x2D30, 0x2D67), (0x2D7F, 0x2D96), (0x2DE0, 0x2E2F), (0xA4D0, 0xA62B),
    (0xA640, 0xA6F1), (0xA717, 0xA7AE), (0xA7F7, 0xA827), (0xA840, 0xA873), (0xA880, 0xA8C5), (0xA8E0, 0xA8FD),
    (0xA900, 0xA953), (0xA960, 0xA97C), (0xA980, 0xA9C0), (0xA9E0, 0xA9FE), (0xAA00, 0xAA36), (0xAA60, 0xAAC2),
    (0xAADB, 0xAAF6), (0xAB30, 0xAB65), (0xAB70, 0xABED), (0xD7B0, 0xD7C6), (0xD7CB, 0xD7FB), (0xFA70, 0xFAD9),
)
# fmt: on
"""Up to U+FFFF: ranges of which every letter, mark and digit is of Unicode 9 or before, which is as old as the older of
both tables (property Age of the Unicode character database)."""

FlatIds = tuple[np.ndarray, np.ndarray]
"""Ids of many texts one after another, int32 [tokens], and their lengths, int64 [texts]."""


class EngineProblem(Exception):
    """gigatoken cannot be used; the message says why."""


class EngineMissing(EngineProblem):
    """gigatoken is not installed."""

    def __init__(self) -> None:
        super().__init__("it is not installed (pip install 'steel-megatron[data]')")


def is_installed() -> bool:
    """Whether gigatoken can be imported."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


class Gigatoken:
    """gigatoken, which encodes special tokens in a text as plain characters and whose memory is bounded.

    One object encodes for one thread at a time: the library makes others wait.

    Args:
        model: the content of a ``tokenizer.json``.
        cache_bytes: growth of the process, for each object, after which what it remembers is dropped.

    Raises:
        EngineProblem: it is not installed or cannot run such a tokenizer.
    """

    def __init__(self, model: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._model = _without_special_tokens(model)
        self._memory = _Memory(cache_bytes)
        self._parallel: bool | None = None  # all cores, but in a process of multiprocessing
        self._renew()
        self._memory.settle()

    def for_thread(self) -> Gigatoken:
        """Another one of the same tokenizer, which uses the calling thread alone; from now on use such ones only."""
        twin = copy.copy(self)
        twin._parallel = False
        with self._memory.of_one_more():
            twin._renew()
        return twin

    def _renew(self) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise EngineMissing from error
        self._tokenizer: Any = None  # its memory goes before the next one's is taken
        self._renewals = self._memory.renewals
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(self._model)
        except (RuntimeError, ValueError) as error:
            raise EngineProblem(f"it cannot run this tokenizer: {str(error).splitlines()[0]}") from error
        self._of_bytes = isinstance(self._tokenizer.backend, gigatoken.gigatoken_rs.BPETokenizer)  # else of characters

    def encode_flat(self, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
        """The ids of many texts, or of their UTF-8, which must be valid."""
        import gigatoken

        if self._memory.look() != self._renewals:
            self._renew()
            self._memory.settle()
        joined = TextBatch.of(texts)
        # An empty one would be skipped between separators.
        whole = len(joined) > 0 and bool(joined.sizes.all())
        batch = gigatoken.BytesSource([joined.content], SEPARATOR) if whole and self._of_bytes else list(joined)
        layout = self._tokenizer.encode_batch(batch, parallel=self._parallel).layout
        offsets, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        assert len(offsets) == len(joined) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
        return ids.astype(np.uint32, copy=False).view(np.int32), np.diff(offsets).astype(np.int64, copy=False)


class _Memory:
    """How far the process has grown since its tokenizers were made; shared by all of them.

    What is remembered cannot be measured by itself, nor the part of one thread: so all drop it together.
    """

    def __init__(self, bytes_each: int) -> None:
        self.renewals = 0
        """How often all were told to drop what they remember."""
        self._bytes_each, self._others = bytes_each, 0
        self._process = psutil.Process()
        self._lock = threading.Lock()
        self._base = 0

    def settle(self) -> None:
        """What the process has now is not what is remembered."""
        with self._lock:
            self._base = self._process.memory_info().rss

    @contextmanager
    def of_one_more(self) -> Iterator[None]:
        """Count one more tokenizer, which is made meanwhile, and do not count what making it takes."""
        with self._lock:
            before = self._process.memory_info().rss
            yield
            self._others += 1
            self._base += max(0, self._process.memory_info().rss - before)

    def look(self) -> int:
        """The number of renewals, of which there may now be one more."""
        with self._lock:
            size = self._process.memory_info().rss
            if size - self._base > self._bytes_each * max(1, self._others):
                self._base = size  # until they have been made anew
                self.renewals += 1
            return self.renewals


def _without_special_tokens(model: str) -> bytes:
    """A ``tokenizer.json`` that finds no special token in a text, adds none around it and cuts and pads nothing."""
    content = orjson.loads(model)
    content["added_tokens"] = [token for token in content.get("added_tokens") or () if not token["special"]]
    return orjson.dumps({**content, "truncation": None, "padding": None, "post_processor": None})


def unsure(texts: Sequence[str] | Sequence[bytes]) -> list[int]:
    """The numbers of the texts that hold a character which gigatoken and a tokenizer's library may see differently.

    Args:
        texts: strings, or their UTF-8.

    Raises:
        DataError: a text is no valid UTF-8 or holds a lone surrogate.
    """
    if helpers is None:
        return unsure_by_numpy(texts)
    joined = TextBatch.of(texts)
    found: list[int] = helpers.holding(joined.content, joined.ends, _unsure_characters().view(np.uint8))
    if not all(_is_utf8(joined[number]) for number in found):
        as_strings(joined)  # raises
    return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def unsure_by_numpy(texts: Sequence[str] | Sequence[bytes]) -> list[int]:
    """What :func:`unsure` gives, slower."""
    strings = as_strings(TextBatch.of(texts))
    numbers = [number for number, text in enumerate(strings) if not text.isascii()]
    joined = "".join(strings[number] for number in numbers)
    hits = []
    for start in range(0, len(joined), _SLICE):
        points = np.frombuffer(joined[start : start + _SLICE].encode("utf-32-le"), dtype=np.uint32)
        hits.append(np.flatnonzero(_unsure_characters().take(points)) + start)
    if not sum(map(len, hits)):
        return []
    ends = np.cumsum([len(strings[number]) for number in numbers])
    return [numbers[at] for at in np.unique(np.searchsorted(ends, np.concatenate(hits), side="right"))]


@functools.cache
def _unsure_characters() -> np.ndarray:
    """Whether a code point is one to be unsure about, bool [0x110000].

    ``tokenizers`` orders marks by tables of Unicode 9 and knows letters up to Unicode 16; gigatoken follows
    Unicode 17. Unicode 3.2, which Python has in addition to its own version, is older than both: what it knows has kept
    its properties ever since, and so has what is settled. Punctuation and symbols of later versions decide nothing.
    """
    old = unicodedata.ucd_3_2_0
    table = np.ones(0x110000, dtype=bool)
    for point in range(0x10000):
        character = chr(point)
        category, order = unicodedata.category(character), unicodedata.combining(character)
        plain = category[0] not in "LMN" and category != "Cn"
        known = category != "Cn" and old.category(character) != "Cn" and old.combining(character) == order
        table[point] = not (plain or known)
    for low, high in (*_SETTLED, *_FAMILIAR_ASTRAL):
        table[low : high + 1] = False
    table[0x9FA6:0xA000] = False  # ideographs that were added to the end of their block
    table[0xD800:0xE000] = True  # surrogates, which are refused
    return table
