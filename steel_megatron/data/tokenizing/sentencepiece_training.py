"""Training a SentencePiece tokenizer that loses nothing: BPE with byte fallback, text taken as it is."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from steel_megatron.data.tokenizing.sentencepiece import SPACE_SYMBOL
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically


def train_sentencepiece(
    texts: Iterable[str],
    model_prefix: str | Path,
    vocab_size: int,
    *,
    control_tokens: Sequence[str] = (),
    character_coverage: float = 0.9995,
    max_bytes: int = 32_000_000,
    seed: int = 0,
) -> Path:
    """Train a byte-pair encoding that loses nothing: ``decode(encode(text)) == text`` for every text.

    Digits are single tokens; runs of spaces (indentation) become tokens; what is not in the vocabulary, line ends
    and tabs included, is spelled in bytes. The same texts and arguments give the same file.

    Args:
        texts: documents; read once, as a stream.
        model_prefix: ``.model`` is appended to it; an existing file is replaced when the new one is complete.
        vocab_size: ids of the tokenizer, with 3 control tokens, those of ``control_tokens`` and 256 bytes among them.
        control_tokens: names of further control tokens, which get the ids from 3 on.
        character_coverage: share of the characters of the text that get a token of their own; the rest is
            spelled in bytes. Lower it, to 0.98 at least, for a small vocabulary of Chinese text.
        max_bytes: lines to train on are drawn at random (by ``seed``) when there is more text than this.
        seed: of that draw.

    Returns:
        The path of the ``.model`` file.

    Raises:
        DataError: there is no text, the vocabulary is too large or too small for it (with the limit), or another
            argument is out of range.
    """
    if max_bytes < 1:
        raise DataError(f"max_bytes is {max_bytes}; it must be at least 1")
    if not 0.98 <= character_coverage <= 1:
        raise DataError(f"character_coverage is {character_coverage}; it must be within [0.98, 1]")
    lines = _sample_lines(texts, max_bytes, seed)
    if not lines:
        raise DataError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            control_symbols=list(control_tokens),
            character_coverage=character_coverage,
            required_chars=SPACE_SYMBOL,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=2,  # a fixed number: it is written into the model file
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(_training_problem(str(error), vocab_size, character_coverage)) from error
    path = Path(f"{os.fspath(model_prefix)}.model")
    write_atomically(path, model.getvalue(), DataError)
    return path


def _training_problem(message: str, vocab_size: int, character_coverage: float) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text; at most {found[1]} is possible"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: the characters and bytes alone need {found[1]}; raise it, or "
            f"lower character_coverage (now {character_coverage}) to spell rare characters in bytes"
        )
    return f"a tokenizer of vocab_size {vocab_size} cannot be trained on this text: {message}"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that are not blank, none over 4,000 bytes (SentencePiece passes over longer ones)."""
    for text in texts:
        for line in text.split("\n"):
            line = line.rstrip("\r")
            if line.strip():
                yield from (line[start : start + 1000] for start in range(0, len(line), 1000))


def _sample_lines(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """All lines, or about half to all of ``max_bytes`` of them drawn evenly from the whole stream.

    Each line draws a number in [0, 1) and is kept while that is under a threshold, which is halved whenever the
    kept lines exceed ``max_bytes``: one pass, bounded memory, original order.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, str]] = []
    size, threshold = 0, 1.0
    for line in _lines(texts):
        number = draw.random()
        if number >= threshold:
            continue
        kept.append((number, line))
        size += len(line.encode())
        while size > max_bytes:
            threshold /= 2
            kept = [(number, line) for number, line in kept if number < threshold]
            size = sum(len(line.encode()) for _, line in kept)
    return [line for _, line in kept]
