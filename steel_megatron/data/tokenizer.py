"""Tokenizers behind one small protocol: Hugging Face's and SentencePiece's.

Every tokenizer here encodes text as text: a ``<|im_end|>`` or ``</s>`` that a document happens to contain becomes
the ids of its characters, never a control token, so that no document can end itself or fake a turn of a
dialogue. Nothing is added at the beginning or the end of a text; the code that builds a corpus or a sample puts
control tokens where they belong.

The objects can be sent to worker processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from steel_megatron.config import TokenizerKind
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically

SPACE_SYMBOL = "▁"
"""U+2581, which SentencePiece writes for a space in its pieces."""

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Types of a piece in SentencePiece's model file."""

_EXPORT_SAMPLE = (
    "软混合专家（Soft-MoE）把每个词元的加权平均送入专家；2024年，模型有 1,122,922,770 个参数。\n“真的吗？”——“是的！”",
    "  The quick brown fox doesn't jump; naïve café, coöperate.\r\n\r\n\tTabs\tand  spaces  ",
    "def f(x):\n    if x == 1:\n        return [i ** 2 for i in range(10)]\n\n\n    # done\n\treturn {'a': 0x1F}\n",
    "😀\U0001f469\u200d\U0001f467 🇨🇳 ▁literal▁▁ ▅ \x00\x7f \ufeff\u200b\ufffd e\u0301 𠮷 12345 aaaaaaaaaaaaaaaaaa",
    "<s></s><unk><0x0A><|im_end|><|endoftext|> </s>\n",
    *("a" + " " * run + "b" for run in range(2, 70)),
    *("-=" * run + " " + "ab" * run + "a" for run in range(2, 40)),
)
"""Texts on which an exported tokenizer must give the same ids before it is written."""


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
        """SHA-256 (hex) of everything that decides which ids a text gets."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text; control tokens written out in it are encoded as plain characters."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, each an int32 array [tokens]."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write files from which transformers' ``AutoTokenizer.from_pretrained`` makes an equal tokenizer."""
        ...


def load_tokenizer(kind: TokenizerKind, path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        kind: ``huggingface`` for a folder, ``sentencepiece`` for a ``.model`` file.
        path: the folder or file.

    Raises:
        DataError: it is missing, damaged, or has no end-of-document token.
    """
    if kind == "huggingface":
        return HuggingFaceTokenizer(path)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path)
    raise DataError(f"tokenizer kind {kind!r} is unknown; it must be huggingface or sentencepiece")


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face ecosystem, run by the ``tokenizers`` library.

    Args:
        folder: holds ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``; and ``tokenizer_config.json``.
        eod_token: the token that ends a document; by default the configuration's ``eos_token``.

    Raises:
        DataError: a file is missing or damaged, or the end-of-document token is not named or not known.
    """

    def __init__(self, folder: str | Path, eod_token: str | None = None) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"tokenizer folder {folder} does not exist")
        config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        eod = eod_token or _token_text(config.get("eos_token"))
        if eod is None:
            raise DataError(f"{folder}/tokenizer_config.json names no eos_token, which ends a document here")
        self.__setstate__({"model": _huggingface_model(folder), "config": config, "eod_token": eod})
        if self._tokenizer.token_to_id(eod) is None:
            raise DataError(f"{folder}: the end-of-document token {eod!r} is not in the vocabulary")

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._tokenizer.to_str(), "config": self._config, "eod_token": self._eod_token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config, self._eod_token = state["config"], state["eod_token"]
        self._tokenizer = tokenizers.Tokenizer.from_str(state["model"])
        # Stored settings of another use: a limit on the length would cut documents without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    @functools.cached_property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""
        index = self._tokenizer.token_to_id(self._eod_token)
        assert index is not None, self._eod_token  # checked when loaded
        return index

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of vocabulary, merges, text normalisation and added tokens, however they are stored."""
        stored = json.loads(self._tokenizer.to_str())
        parts = {name: stored[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        if "merges" in parts["model"]:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in parts["model"]["merges"]]
            parts["model"]["merges"] = pairs
        canonical = json.dumps({**parts, "eod_token": self._eod_token}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; control tokens written out in it are encoded as plain characters."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, each an int32 array [tokens]."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and its configuration (chat template included) into ``folder``."""
        _save_huggingface(Path(folder), self._tokenizer, {**self._config, "eos_token": self._eod_token})


def _huggingface_model(folder: Path) -> str:
    """The content of ``tokenizer.json``, made from the older pair of files where it is missing."""
    if (folder / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
        except Exception as error:  # the Rust extension raises bare Exceptions
            raise DataError(f"{folder}/tokenizer.json cannot be loaded: {error}") from error
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]
    if missing:
        raise DataError(f"{folder} has neither tokenizer.json nor {' and '.join(missing)}")
    # Only this rare form needs transformers, which takes a second to import and brings torch along.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return loaded.backend_tokenizer.to_str()


def _save_huggingface(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    # The generic class takes tokenizer.json as it is. A model's own class (Qwen2Tokenizer, ...) would rebuild
    # the pipeline by its own rules, and `auto_map` would ask for code that is not in the folder.
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config.pop("auto_map", None)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode(), DataError)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_atomically(folder / "tokenizer_config.json", text.encode(), DataError)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a JSON object was expected")
    return content


def _token_text(token: object) -> str | None:
    """A token of ``tokenizer_config.json``, which is written as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


class SentencePieceTokenizer:
    """A tokenizer run by SentencePiece.

    With a model from :func:`train_sentencepiece`, decoding gives back any text exactly, also one that holds
    SentencePiece's own symbol for a space (U+2581), which the plain library would turn into a space.

    Args:
        model_file: the ``.model`` file.

    Raises:
        DataError: the file is missing or damaged, or the model has no end-of-sentence piece.
    """

    def __init__(self, model_file: str | Path) -> None:
        try:
            model = Path(model_file).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer model {model_file} cannot be read: {error.strerror}") from error
        try:
            if not model:  # which the library takes for no model being given
                raise ValueError("the file is empty")
            self.__setstate__(model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{model_file} is no SentencePiece model: {error}") from error
        if self._processor.eos_id() < 0:
            raise DataError(f"{model_file} has no end-of-sentence piece, which ends a document here")

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._lossless = _is_lossless(_parse_model(model))
        self._space_symbol_ids = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self._processor.GetPieceSize()

    @property
    def eod_id(self) -> int:
        """The id that ends a document: the model's end-of-sentence piece."""
        return self._processor.eos_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model file."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; control tokens written out in it are encoded as plain characters."""
        if not self._lossless or SPACE_SYMBOL not in text:
            return self._processor.Encode(text, return_type=int)
        first, *others = (self._processor.Encode(part, return_type=int) for part in text.split(SPACE_SYMBOL))
        for part in others:
            first += self._space_symbol_ids + part
        return first

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, each an int32 array [tokens]."""
        plain = [text if SPACE_SYMBOL not in text else "" for text in texts]
        encoded = self._processor.Encode(plain, return_type="numpy", num_threads=1)
        return [
            np.asarray(ids if SPACE_SYMBOL not in text else self.encode(text), dtype=np.int32)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        return self._processor.Decode([int(token) for token in ids])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an equal ``tokenizer.json`` and its configuration into ``folder``.

        Raises:
            DataError: the model is of a kind that cannot be expressed there, or the two disagree on a sample text.
        """
        if not self._lossless:
            raise DataError(
                "only a BPE model with byte fallback, identity normalisation and no dummy prefix (as made by "
                "train_tokenizer) can be exported; for another model use its Hugging Face folder as the tokenizer"
            )
        exported = _export_sentencepiece(_parse_model(self._model))
        for text in _EXPORT_SAMPLE:
            theirs = exported.encode(text, add_special_tokens=False).ids
            if theirs != self.encode(text) or exported.decode(theirs) != text:
                raise DataError(
                    f"the exported tokenizer would encode {text!r} differently from the SentencePiece model"
                )
        unknown, bos, eos = (
            self._processor.IdToPiece(index) if index >= 0 else None
            for index in (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        )
        _save_huggingface(Path(folder), exported, {"unk_token": unknown, "bos_token": bos, "eos_token": eos})


def _parse_model(model: bytes) -> Any:
    parsed = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    parsed.ParseFromString(model)
    return parsed


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
