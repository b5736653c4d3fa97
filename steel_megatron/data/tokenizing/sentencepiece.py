"""Tokenizers of the SentencePiece library: a ``.model`` file."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from steel_megatron.config import TokenizerEngine, TokenizerKind
from steel_megatron.data.tokenizing.base import TokenizerBase, flatten
from steel_megatron.data.tokenizing.gigatoken_engine import CHECK_TEXTS, EngineProblem, FlatIds
from steel_megatron.data.tokenizing.huggingface import save_as_trained
from steel_megatron.errors import DataError

SPACE_SYMBOL = "▁"
"""U+2581, which SentencePiece writes for a space in its pieces."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Types of a piece in SentencePiece's model file."""

_CONTROL_NAME = re.compile(r"<\|\w+\|>")
"""User-defined pieces of such a name are taken for control pieces: the library would find them in any text."""

_ONLY_LOSSLESS = (
    "only a BPE model with byte fallback, identity normalisation, no dummy prefix and no user-defined pieces (as made "
    "by train_tokenizer) can be expressed as a tokenizer.json"
)


class SentencePieceTokenizer(TokenizerBase):
    """A tokenizer run by SentencePiece, or by gigatoken where that gives the same ids.

    With a model from :func:`train_sentencepiece`, decoding gives back any text exactly, also one that holds
    SentencePiece's own symbol for a space (U+2581), which the plain library would turn into a space.

    Args:
        model_file: the ``.model`` file.
        engine: what encodes many texts.
        eod_token: the piece that ends a document; by default the model's end-of-sentence piece.

    Raises:
        DataError: the file is missing or damaged; or the model has no end-of-sentence piece, or not the one named.
    """

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, model_file: str | Path, engine: TokenizerEngine = "auto", eod_token: str | None = None) -> None:
        try:
            model = Path(model_file).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer model {model_file} cannot be read: {error.strerror}") from error
        try:
            if not model:  # which the library takes for no model being given
                raise ValueError("the file is empty")
            super().__init__(str(model_file), (model, eod_token), engine)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{model_file} is no SentencePiece model: {error}") from error
        if eod_token is not None and eod_token not in self._control_ids:
            raise DataError(f"{model_file} has no piece {eod_token!r}, which is named as the end of a document")
        if self.eod_id < 0:
            raise DataError(
                f"{model_file} has no end-of-sentence piece, which ends a document here; name a piece as eod_token"
            )
        self._check_plain_text(self._control_ids, self._control_ids)

    def _content(self) -> tuple[bytes, str | None]:
        return self._model, self._eod_token

    def _load(self, content: tuple[bytes, str | None]) -> None:
        self._model, self._eod_token = content
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self._parsed = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        self._parsed.ParseFromString(self._model)
        if marks := [piece for piece in self._parsed.pieces if self._is_hidden_control(piece)]:
            for piece in marks:
                piece.type = _CONTROL
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._parsed.SerializeToString())
        self._lossless = _is_lossless(self._parsed)
        self._space_symbol_ids = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    def _is_hidden_control(self, piece: Any) -> bool:
        """Whether a piece that the plain library finds in any text is a control piece by what it is for."""
        trainer = self._parsed.trainer_spec
        if piece.type == _USER_DEFINED and _CONTROL_NAME.fullmatch(piece.piece):
            return True
        named = (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece, self._eod_token)
        return piece.type in (_NORMAL, _USER_DEFINED) and piece.piece in named

    def _fast_model(self) -> str:
        if not self._lossless:
            raise EngineProblem(_ONLY_LOSSLESS)
        return _export_sentencepiece(self._parsed).to_str()

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self._processor.GetPieceSize()

    @property
    def eod_id(self) -> int:
        """The id that ends a document: the model's end-of-sentence piece, or the one named."""
        return self._processor.eos_id() if self._eod_token is None else self._control_ids[self._eod_token]

    @functools.cached_property
    def _control_ids(self) -> dict[str, int]:
        return {piece.piece: index for index, piece in enumerate(self._parsed.pieces) if piece.type == _CONTROL}

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of all control tokens by name."""
        return self._control_ids

    def control_id(self, text: str) -> int | None:
        """The id of a control piece; None when there is none of that name.

        A user-defined piece with a name such as ``<|im_start|>`` is a control piece here.
        """
        return self._control_ids.get(text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model file, and of the end-of-document piece where that is another than its own."""
        other = self.eod_id != self._processor.eos_id()
        return hashlib.sha256(self._model + f"\0{self._eod_token}".encode() * other).hexdigest()

    def _encode(self, text: str) -> list[int]:
        if not self._lossless or SPACE_SYMBOL not in text:
            return self._processor.Encode(text, return_type=int)
        first, *others = (self._processor.Encode(part, return_type=int) for part in text.split(SPACE_SYMBOL))
        for part in others:
            first += self._space_symbol_ids + part
        return first

    def _encode_flat(self, texts: list[str]) -> FlatIds:
        plain = [text if SPACE_SYMBOL not in text else "" for text in texts]
        encoded = self._processor.Encode(plain, return_type="numpy", num_threads=1)
        return flatten(
            [
                ids if SPACE_SYMBOL not in text else np.array(self._encode(text), dtype=np.int32)
                for text, ids in zip(texts, encoded, strict=True)
            ]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        return self._processor.Decode([int(token) for token in ids])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an equal ``tokenizer.json`` and its configuration into ``folder``.

        Raises:
            DataError: the model is of a kind that cannot be expressed there, or the two disagree on a sample text.
        """
        if not self._lossless:
            raise DataError(f"{_ONLY_LOSSLESS}; for another model use its Hugging Face folder as the tokenizer")
        exported = _export_sentencepiece(self._parsed)
        for text in CHECK_TEXTS:
            theirs = exported.encode(text, add_special_tokens=False).ids
            if theirs != self.encode(text) or exported.decode(theirs) != text:
                raise DataError(
                    f"the exported tokenizer would encode {text!r} differently from the SentencePiece model"
                )
        named = {"unk_token": self._processor.unk_id(), "pad_token": self._processor.pad_id()}
        config = {name: self._processor.IdToPiece(index) for name, index in named.items() if index >= 0}
        save_as_trained(Path(folder), exported, config, self._processor.IdToPiece(self.eod_id))


def _is_lossless(model: Any) -> bool:
    """Whether decoding gives back every text: byte fallback, and nothing changes the text on the way in."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    return (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and normalizer.escape_whitespaces
        and {piece.type for piece in model.pieces} <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
        and any(piece.piece == SPACE_SYMBOL for piece in model.pieces)
    )


def _export_sentencepiece(model: Any) -> tokenizers.Tokenizer:
    """The same tokenizer for the ``tokenizers`` library.

    Spaces stand for themselves in the exported pieces, so U+2581 in a text stays apart from them. SentencePiece
    merges any two neighbours whose concatenation is a piece, best score first; that is a BPE whose merges are all
    splits of all pieces, in the order of the pieces' scores.
    """
    names = [piece.piece.replace(SPACE_SYMBOL, " ") for piece in model.pieces]
    score = {name: piece.score for name, piece in zip(names, model.pieces, strict=True) if piece.type == _NORMAL}
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(score, key=lambda name: -score[name])
        for cut in range(1, len(name))
        if name[:cut] in score and name[cut:] in score
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    unknown = names[model.trainer_spec.unk_id]
    bpe = tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True)
    exported = tokenizers.Tokenizer(bpe)
    exported.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    control = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    exported.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in control])
    exported.encode_special_tokens = True
    return exported
