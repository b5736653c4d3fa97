"""From raw corpora to a tokenizer, and how many bytes of each kind of text one of its tokens holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from steel_megatron.config import BadRowPolicy
from steel_megatron.data.reading.documents import Document, read_documents
from steel_megatron.data.reading.forms import is_code
from steel_megatron.data.reading.inputs import Input, find_inputs
from steel_megatron.data.reading.storage import status_of
from steel_megatron.data.tokenizing.sentencepiece import SentencePieceTokenizer
from steel_megatron.data.tokenizing.sentencepiece_training import train_sentencepiece
from steel_megatron.data.tokenizing.tokenizer import DIALOGUE_MARKS, Tokenizer, encode_dialogues
from steel_megatron.errors import DataError
from steel_megatron.log import progress

TextKind = Literal["zh", "en", "code"]

ZH_SHARE = 0.2
"""A text with at least this share of Chinese characters counts as Chinese."""

_CODE_SOURCE = "starcoder"
_BATCH_CHARACTERS = 1_000_000


@dataclass
class Measure:
    """What texts of one kind came to."""

    documents: int = 0
    bytes: int = 0
    """In UTF-8."""
    tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """The higher, the shorter is the same text in tokens."""
        return self.bytes / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """The counts and their quotient, for JSON."""
        return {**asdict(self), "bytes_per_token": round(self.bytes_per_token, 4)}


@dataclass(frozen=True)
class TrainedTokenizer:
    """A new tokenizer and what was measured with it."""

    model: Path
    """The ``.model`` file."""
    tokenizer: SentencePieceTokenizer
    kinds: dict[TextKind, Measure]
    held_out: bool
    """Whether that was measured on text that the tokenizer was not trained on."""
    skipped: int
    """Rows that gave no document, of the text to train on and of the text to measure on."""
    left_out: dict[str, Any]
    """What the inputs hold in addition to what is read, by reason."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "model": str(self.model),
            **self.tokenizer.describe(),
            "held_out": self.held_out,
            "skipped": self.skipped,
            "left_out": self.left_out,
            "kinds": {kind: measure.as_dict() for kind, measure in self.kinds.items()},
        }


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    vocab_size: int,
    *,
    valid: Sequence[str] = (),
    text_key: str = "text",
    control_tokens: Sequence[str] = DIALOGUE_MARKS,
    character_coverage: float = 0.9995,
    max_bytes: int = 32_000_000,
    on_bad_row: BadRowPolicy = "stop",
    seed: int = 0,
) -> TrainedTokenizer:
    """Train a lossless SentencePiece BPE on a corpus and measure it.

    Args:
        inputs: what to train on; see :func:`~steel_megatron.data.reading.inputs.find_inputs`.
        output: path of the model without its suffix ``.model``.
        vocab_size: ids of the tokenizer.
        valid: what to measure on, in the same form; the text that was trained on if there is none.
        text_key: which value of a JSON row is the text.
        control_tokens: names of control tokens in addition to the three of every model; nothing is learned from them
            where they occur in the text, as the marks of dialogues do.
        character_coverage: share of the characters that get a token of their own.
        max_bytes: lines to train on are drawn at random when there is more text than this.
        on_bad_row: ``stop`` at a row that cannot be read, or ``skip`` it.
        seed: of that draw.

    Raises:
        DataError: the input cannot be read, a file is both trained and measured on, or no such tokenizer can be
            trained on it.
    """
    skipped = 0

    def count(_: object) -> None:
        nonlocal skipped
        skipped += 1

    def documents(chosen: list[Input], title: str) -> Iterator[tuple[TextKind, Document]]:
        with progress(title, sum(status_of(found.path).size for found in chosen), "bytes") as bar:
            for found in chosen:
                rows = read_documents(found.path, text_key, on_bad_row, count, bar.advance, found.source)
                yield from ((kind_of(document, found.source), document) for document in rows)

    once = "training reads its text more than once"
    found = find_inputs(inputs, streams_for=once)
    trained_on = found.files
    measured_on = find_inputs(valid, streams_for=once).files if valid else trained_on
    if both := {found.path for found in trained_on} & {found.path for found in measured_on if valid}:
        raise DataError(f"{min(both)} is among the text to train on and the held-out text; leave it out of one of them")
    model = train_sentencepiece(
        (document.text for _, document in documents(trained_on, "read")),
        output,
        vocab_size,
        control_tokens=control_tokens,
        character_coverage=character_coverage,
        max_bytes=max_bytes,
        seed=seed,
    )
    if not valid:
        skipped = 0  # the same rows will be met again
    tokenizer = SentencePieceTokenizer(model)
    kinds = measure(tokenizer, documents(measured_on, "measure"))
    return TrainedTokenizer(model, tokenizer, kinds, bool(valid), skipped, found.left_out)


def kind_of(document: Document, source: str = "text") -> TextKind:
    """``code`` by the file's suffix or the source's name; ``zh`` by the share of Chinese characters; ``en`` else."""
    if is_code(document.source) or source == _CODE_SOURCE:
        return "code"
    chinese = sum("\u3400" <= character <= "\u9fff" for character in document.text)
    return "zh" if chinese >= ZH_SHARE * len(document.text) else "en"


def measure(tokenizer: Tokenizer, documents: Iterable[tuple[TextKind, Document]]) -> dict[TextKind, Measure]:
    """Count documents, bytes and tokens of each kind of text, in one pass and bounded memory."""
    kinds: dict[TextKind, Measure] = {}
    batches: dict[tuple[TextKind, bool], list[str]] = {}
    sizes: dict[tuple[TextKind, bool], int] = {}

    def encode(name: tuple[TextKind, bool]) -> None:
        kind, dialogue = name
        texts = batches.pop(name)
        ids, _ = encode_dialogues(tokenizer, texts) if dialogue else tokenizer.encode_flat(texts)
        total = kinds.setdefault(kind, Measure())
        total.documents += len(texts)
        total.bytes += sum(len(text.encode()) for text in texts)
        total.tokens += len(ids)
        sizes[name] = 0

    for kind, document in documents:
        name = (kind, document.dialogue)
        batches.setdefault(name, []).append(document.text)
        sizes[name] = sizes.get(name, 0) + len(document.text)
        if sizes[name] >= _BATCH_CHARACTERS:
            encode(name)
    for name in list(batches):
        encode(name)
    return dict(sorted(kinds.items()))
