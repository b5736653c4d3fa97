"""What all tokenizers share: many texts encoded at once, by the engine that is the fastest with the same ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self, get_args

import numpy as np

from steel_megatron.config import TokenizerEngine, TokenizerKind
from steel_megatron.data.reading.text_batch import TextBatch, as_strings, encode_text
from steel_megatron.data.tokenizing.chunking import groups
from steel_megatron.data.tokenizing.gigatoken_engine import (
    CHECK_TEXTS,
    EngineMissing,
    EngineProblem,
    FlatIds,
    Gigatoken,
    is_installed,
    unsure,
)
from steel_megatron.data.tokenizing.remembered import key_of, recall, remember
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger

_VERIFIED_CHARACTERS = 100_000
"""How much of the texts handed to ``verify_on`` is compared: what takes well under a second."""

_AT_ONCE = 1 << 20
"""Characters that a tokenizer's own library gets at once, unless a single text has more."""

_RARE = "".join(chr(point) for point in (*range(1, 0x250), 0x5E8F, 0xE000, 0x10FFFD))
"""Characters among which a vocabulary of characters has some and not others."""

_log = get_logger(__name__)


class TokenizerBase(ABC):
    """A tokenizer whose batches are encoded by its own library or by gigatoken.

    The choice is made, and checked on sample texts, when it is first needed; it is remembered for the next start, and
    worker processes inherit it.
    """

    kind: TokenizerKind

    def __init__(self, name: str, content: Any, engine: TokenizerEngine) -> None:
        if engine not in get_args(TokenizerEngine):
            known = ", ".join(get_args(TokenizerEngine))
            raise DataError(f"tokenizer engine {engine!r} is unknown; it must be one of {known}")
        self._name, self._wanted = name, engine
        self._engine: TokenizerEngine | None = None
        self._gigatoken: Gigatoken | None = None
        self._load(content)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self._name, "content": self._content(), "engine": self.engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._name, self._wanted, self._gigatoken = state["name"], state["engine"], None
        self._engine = state["engine"]
        self._load(state["content"])

    @property
    @abstractmethod
    def control_tokens(self) -> Mapping[str, int]:
        """The ids of all control tokens by name."""

    @property
    def chat_template(self) -> str | None:
        """How conversations become text, in Jinja; None if the tokenizer's files do not say."""
        return None

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """``bos_token`` and ``eos_token`` as templates call them, as far as there are any."""
        names = {index: name for name, index in self.control_tokens.items()}
        return {"eos_token": names[self.eod_id]} if self.eod_id in names else {}

    @abstractmethod
    def _content(self) -> Any:
        """What the tokenizer is made of, to be pickled."""

    @abstractmethod
    def _load(self, content: Any) -> None:
        """Set up from :meth:`_content`."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text, by the tokenizer's own library."""

    @abstractmethod
    def _encode_flat(self, texts: list[str]) -> FlatIds:
        """The ids of many texts, by the tokenizer's own library."""

    @abstractmethod
    def _fast_model(self) -> str:
        """A ``tokenizer.json`` for gigatoken; raises EngineProblem when there is none."""

    def _check_texts(self) -> Iterable[str]:
        """Texts on which gigatoken must give the same ids to be chosen."""
        return CHECK_TEXTS

    def _check_plain_text(self, control: Mapping[str, int], spelled: Collection[str] = ()) -> None:
        """Make sure that no text gives the id of a control token; to be called when a tokenizer is loaded.

        Args:
            control: ids of control tokens by name.
            spelled: control tokens whose characters must be kept from making them; those must not get lost.

        Raises:
            DataError: a text gives one, or loses it.
        """
        texts = [*CHECK_TEXTS, _RARE, *(text for name in control for text in (name, f"a{name}b", f" {name} "))]
        try:
            encoded = self._encode_flat(texts)
        except Exception as error:  # the Rust extension raises bare Exceptions, as where there is no unknown token
            raise DataError(f"{self._name} cannot encode every text: {error}") from error
        names = {index: name for name, index in control.items()}
        for text, ids in zip(texts, _split(*encoded), strict=True):
            if found := names.keys() & set(ids.tolist()):
                raise DataError(
                    f"{self._name} gives the control token {names[min(found)]!r} for the plain text {_begin(text)!r}, "
                    "so that a document could end itself; name another end-of-document token (eod_token), or do not "
                    "mark that token as special"
                )
        for name in spelled:
            if not self._encode(name):
                raise DataError(
                    f"{self._name} has no id for the plain text {name!r} but that of the control token of this name; "
                    "name another end-of-document token (eod_token), or do not mark that token as special"
                )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    @abstractmethod
    def eod_id(self) -> int:
        """The id that ends a document."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text gets; the engine is not part of it."""

    @property
    def engine(self) -> TokenizerEngine:
        """What encodes many texts: ``gigatoken``, or ``tokenizers`` for the tokenizer's own library.

        Raises:
            DataError: gigatoken was asked for and cannot be used.
        """
        if self._engine is None:
            self._engine = "tokenizers" if self._wanted == "tokenizers" else self._try_gigatoken()
        return self._engine

    def _try_gigatoken(self) -> TokenizerEngine:
        key = key_of("gigatoken", self.kind, self.fingerprint)
        if is_installed() and (known := recall(key)) is not None:
            problem = known[0]["problem"]
            return "gigatoken" if problem is None else self._without_gigatoken(EngineProblem(problem))
        try:
            fast = Gigatoken(self._fast_model())
            self._compare(fast, list(self._check_texts()))
        except EngineProblem as found:
            if not isinstance(found, EngineMissing):
                remember(key, {"problem": str(found)})
            return self._without_gigatoken(found)
        remember(key, {"problem": None})
        self._gigatoken = fast
        return "gigatoken"

    def _without_gigatoken(self, problem: EngineProblem) -> TokenizerEngine:
        if self._wanted == "gigatoken":
            raise DataError(f"gigatoken was asked for and cannot encode for {self._name}: {problem}") from problem
        if isinstance(problem, EngineMissing):
            _log.info(f"gigatoken would encode several times faster, but {problem}")
        else:
            _log.warning(f"{self._name} is encoded without gigatoken, several times slower: {problem}")
        return "tokenizers"

    def _compare(self, fast: Gigatoken, texts: list[str]) -> None:
        left_out = set(unsure(texts))
        texts = [text for number, text in enumerate(texts) if number not in left_out]
        ours, theirs = _split(*self._encode_flat(texts)), _split(*fast.encode_flat(texts))
        for text, expected, found in zip(texts, ours, theirs, strict=True):
            if not np.array_equal(expected, found):
                raise EngineProblem(f"it gives other ids for {_begin(text)!r}")

    def verify_on(self, texts: Sequence[str] | Sequence[bytes]) -> None:
        """Compare gigatoken, if that is the engine, with the tokenizer's own library on the begin of real texts.

        Where they differ, the own library is the engine from now on, with a warning. Call it before the tokenizer is
        sent to workers.

        Raises:
            DataError: they differ, and gigatoken was asked for; or a text is no valid UTF-8 or holds a lone surrogate.
        """
        fast = self._engine_for_batches()
        if fast is None:
            return
        sample: list[str] = []
        left = _VERIFIED_CHARACTERS
        for text in texts:
            sample.append(as_strings([text])[0][:left])
            left -= len(sample[-1])
            if left <= 0:
                break
        try:
            self._compare(fast, sample)
        except EngineProblem as problem:
            self._engine, self._gigatoken = self._without_gigatoken(problem), None

    def _engine_for_batches(self) -> Gigatoken | None:
        if self.engine == "gigatoken" and self._gigatoken is None:  # chosen and checked by another process
            try:
                self._gigatoken = Gigatoken(self._fast_model())
            except EngineProblem as problem:
                raise DataError(f"gigatoken cannot encode for {self._name} in this process: {problem}") from problem
        return self._gigatoken

    def for_thread(self) -> Self:
        """A twin that is used by another thread, and by that alone, at the same time; where gigatoken encodes."""
        fast = self._engine_for_batches()
        assert fast is not None, self.engine
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)  # the own library's object is read only
        twin._gigatoken = fast.for_thread()
        return twin

    def encode(self, text: str) -> list[int]:
        """The ids of a text; control tokens written out in it are encoded as plain characters.

        Raises:
            DataError: the text holds a lone surrogate.
        """
        encode_text(text)
        return self._encode(text)

    def encode_flat(self, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
        """The ids of many texts one after another, the fastest way.

        Args:
            texts: strings, or their UTF-8.

        Returns:
            ids: int32 [tokens].
            lengths: how many of them belong to each text, int64 [texts].

        Raises:
            DataError: a text is no valid UTF-8 or holds a lone surrogate.
        """
        fast = self._engine_for_batches()
        joined = TextBatch.of(texts)
        slow = unsure(joined)  # which also finds what is no text
        if fast is None:
            return self._encode_by_library(as_strings(texts))
        ids, lengths = fast.encode_flat(joined)
        if not slow:
            return ids, lengths
        own_ids, own_lengths = self._encode_by_library(as_strings([joined[number] for number in slow]))
        ends = np.cumsum(lengths)
        parts, done = [], 0
        for number, own in zip(slow, _split(own_ids, own_lengths), strict=True):
            parts += [ids[done : ends[number] - lengths[number]], own]
            done = ends[number]
        lengths[slow] = own_lengths
        return np.concatenate([*parts, ids[done:]]), lengths

    def _encode_by_library(self, texts: list[str]) -> FlatIds:
        """The ids of many texts by the tokenizer's own library, which takes a hundred times a text in memory."""
        encoded = [self._encode_flat(group) for group in groups(texts, _AT_ONCE)]
        if len(encoded) == 1:
            return encoded[0]
        return flatten([part for group in encoded for part in _split(*group)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, each an int32 array [tokens]."""
        return _split(*self.encode_flat(texts))

    def describe(self) -> dict[str, Any]:
        """What a manifest records of a tokenizer; nothing that depends on the engine."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
        }


def _begin(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def flatten(parts: Sequence[np.ndarray]) -> FlatIds:
    """The ids of several texts one after another, int32 [tokens], and their lengths, int64 [texts]."""
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    ids = np.concatenate(parts) if parts else np.array([])
    return ids.astype(np.int32, copy=False), lengths
