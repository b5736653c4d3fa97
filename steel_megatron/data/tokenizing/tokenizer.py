"""Tokenizers behind one small protocol: Hugging Face's and SentencePiece's.

Every tokenizer here encodes text as text: a ``<|im_end|>`` or ``</s>`` that a document happens to contain becomes
the ids of its characters, never a control token, so that no document can end itself or fake a turn of a
dialogue. Nothing is added at the beginning or the end of a text; the code that builds a corpus or a sample puts
control tokens where they belong, and :func:`encode_dialogues` does for dialogues.

The objects can be sent to worker processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from steel_megatron.config import TokenizerEngine, TokenizerKind
from steel_megatron.data.reading.text_batch import as_strings
from steel_megatron.data.tokenizing.chunking import DIALOGUE_MARKS
from steel_megatron.data.tokenizing.gigatoken_engine import FlatIds
from steel_megatron.data.tokenizing.huggingface import HuggingFaceTokenizer
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.errors import DataError, SteelError
from steel_megatron.files import moved_with
from steel_megatron.log import get_logger

logger = get_logger(__name__)

__all__ = [
    "DIALOGUE_MARKS",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "encode_dialogue",
    "encode_dialogues",
    "find_tokenizer",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """What the library needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        ...

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text gets; the engine is not part of it."""
        ...

    @property
    def engine(self) -> TokenizerEngine:
        """What encodes many texts: ``gigatoken``, or ``tokenizers`` for the tokenizer's own library."""
        ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The ids of all control tokens by name."""
        ...

    @property
    def chat_template(self) -> str | None:
        """How conversations become text, in Jinja; None if the tokenizer's files do not say."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """``bos_token`` and ``eos_token`` as templates call them, as far as there are any."""
        ...

    def control_id(self, text: str) -> int | None:
        """The id of a control token such as ``<|im_start|>``; None when there is none of that name."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text; control tokens written out in it are encoded as plain characters."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, each an int32 array [tokens]."""
        ...

    def encode_flat(self, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
        """The ids of many texts one after another, int32 [tokens], and their lengths, int64 [texts]: the fast way."""
        ...

    def for_thread(self) -> Tokenizer:
        """A twin that is used by another thread, and by that alone, at the same time; where gigatoken encodes."""
        ...

    def verify_on(self, texts: Sequence[str] | Sequence[bytes]) -> None:
        """Leave gigatoken, with a warning, if it gives other ids on these texts than the tokenizer's own library."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write files from which transformers' ``AutoTokenizer.from_pretrained`` makes an equal tokenizer."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a manifest records: ``kind``, ``fingerprint``, ``vocab_size`` and ``eod_id``."""
        ...


def load_tokenizer(
    kind: TokenizerKind, path: str | Path, engine: TokenizerEngine = "auto", eod_token: str | None = None
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        kind: ``huggingface`` for a folder or a ``tokenizer.json``, ``sentencepiece`` for a ``.model`` file, which is
            recognised under the other kind as well.
        path: the folder or file.
        engine: what encodes many texts: ``gigatoken``, ``tokenizers`` for the tokenizer's own library, or ``auto``
            for gigatoken where it is installed and gives the same ids.
        eod_token: the token that ends a document; by default the one that the tokenizer's files name.

    Raises:
        DataError: it is missing, damaged, or has no end-of-document token; plain text gives a control token whatever
            is done; or gigatoken is asked for and cannot be used.
    """
    tokenizer: Tokenizer
    if kind == "huggingface" and _is_sentencepiece(Path(path)):
        kind = "sentencepiece"
    try:
        if kind == "huggingface":
            tokenizer = HuggingFaceTokenizer(path, eod_token, engine)
        elif kind == "sentencepiece":
            tokenizer = SentencePieceTokenizer(path, engine, eod_token)
        else:
            raise DataError(f"tokenizer kind {kind!r} is unknown; it must be huggingface or sentencepiece")
    except SteelError:
        raise
    except BaseException as error:
        # Crafted files reach code that does not expect them; Rust's panics are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizer {path} cannot be read: {type(error).__name__}: {error}") from error
    if engine == "gigatoken":
        assert tokenizer.engine == engine  # raises here, not hours later, when it cannot be used
    return tokenizer


def _is_sentencepiece(path: Path) -> bool:
    """Whether a file is a SentencePiece model, by its name and because it is no JSON."""
    if path.suffix != ".model" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return not file.read(64).lstrip().startswith(b"{")
    except OSError:
        return False


def find_tokenizer(kind: TokenizerKind, named: str, folder: Path, fingerprint: str | None) -> Tokenizer:
    """Load the tokenizer of a run, which may have been moved.

    Args:
        kind: as for :func:`load_tokenizer`.
        named: its path in the run's settings, relative to where the run was started.
        folder: the checkpoint or run; a tokenizer that is not where ``named`` says is looked for around it.
        fingerprint: of the tokenizer that made the corpora; without it, nothing is taken that is elsewhere.

    Raises:
        DataError: it is not found, or cannot be loaded; the message names what was found in its place.
    """
    if Path(named).exists():
        tokenizer = load_tokenizer(kind, named)
        if fingerprint is not None and tokenizer.fingerprint != fingerprint:
            logger.warning(
                f"the tokenizer {named} has the fingerprint {tokenizer.fingerprint}; the corpora were made with "
                f"{fingerprint}"
            )
        return tokenizer
    others = []
    for place in moved_with(named, folder, levels=4):
        if not place.exists():
            continue
        try:
            tokenizer = load_tokenizer(kind, place)
        except DataError:
            continue
        if tokenizer.fingerprint == fingerprint:
            logger.info(f"the tokenizer {named} was moved: it is read from {place}")
            return tokenizer
        others.append(f"; {place} is another one ({tokenizer.fingerprint}, recorded is {fingerprint})")
    raise DataError(f"the tokenizer {named} does not exist{''.join(others)}")


def encode_dialogue(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of one dialogue, int32 [tokens]; see :func:`encode_dialogues`."""
    return encode_dialogues(tokenizer, [text])[0]


def encode_dialogues(tokenizer: Tokenizer, texts: Sequence[str] | Sequence[bytes]) -> FlatIds:
    """The ids of dialogues in their text form, whose marks become control tokens.

    The marks are :data:`DIALOGUE_MARKS`, as far as the tokenizer has control tokens of these names; other control
    tokens written out in a dialogue are plain characters, and so is a mark that the tokenizer does not have.

    Args:
        tokenizer: encodes what is between the marks.
        texts: strings, or their UTF-8.

    Returns:
        ids: of all dialogues one after another, int32 [tokens].
        lengths: how many of them belong to each dialogue, int64 [texts].

    Raises:
        DataError: a text is no valid UTF-8 or holds a lone surrogate.
    """
    ids_of = {mark: index for mark in DIALOGUE_MARKS if (index := tokenizer.control_id(mark)) is not None}
    if not ids_of or not texts:
        return tokenizer.encode_flat(texts)
    # Split at the marks, which stay: plain parts and marks take turns, plain (maybe empty) ones at both ends.
    pattern = re.compile(f"({'|'.join(map(re.escape, ids_of))})")
    dialogues = [pattern.split(text) for text in as_strings(texts)]
    ids, lengths = tokenizer.encode_flat([part for parts in dialogues for part in parts[::2]])
    ends = np.cumsum(lengths)
    marks = np.array([len(parts) // 2 for parts in dialogues], dtype=np.int64)
    last = np.cumsum(marks + 1) - 1
    places = np.delete(ends, last)  # behind every plain part but the last one of its dialogue
    ids = np.insert(ids, places, [ids_of[mark] for parts in dialogues for mark in parts[1::2]])
    return ids, np.diff(ends[last], prepend=0) + marks
