"""Tokenizers of the Hugging Face ecosystem: a folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from steel_megatron.config import TokenizerKind
from steel_megatron.data.fast_encoding import CHECK_TEXTS, FlatIds
from steel_megatron.data.tokenizer_base import Engine, TokenizerBase, flatten
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically


class HuggingFaceTokenizer(TokenizerBase):
    """A tokenizer of the Hugging Face ecosystem, run by the ``tokenizers`` library or by gigatoken.

    Args:
        folder: holds ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``; and ``tokenizer_config.json``. The
            path of its ``tokenizer.json`` stands for the folder.
        eod_token: the token that ends a document; by default the configuration's ``eos_token``.
        engine: what encodes many texts.

    Raises:
        DataError: a file is missing or damaged, or the end-of-document token is not named or not known.
    """

    kind: TokenizerKind = "huggingface"

    def __init__(self, folder: str | Path, eod_token: str | None = None, engine: Engine = "auto") -> None:
        folder = Path(folder)
        if folder.name == "tokenizer.json" and folder.is_file():
            folder = folder.parent
        if not folder.is_dir():
            raise DataError(f"tokenizer folder {folder} does not exist")
        config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        eod = eod_token or _token_text(config.get("eos_token"))
        if eod is None:
            raise DataError(f"{folder}/tokenizer_config.json names no eos_token, which ends a document here")
        content = {"model": _huggingface_model(folder), "config": config, "eod_token": eod}
        super().__init__(f"the tokenizer in {folder}", content, engine)
        if self._tokenizer.token_to_id(eod) is None:
            raise DataError(f"{folder}: the end-of-document token {eod!r} is not in the vocabulary")

    def _content(self) -> dict[str, Any]:
        return {"model": self._tokenizer.to_str(), "config": self._config, "eod_token": self._eod_token}

    def _load(self, content: dict[str, Any]) -> None:
        self._config, self._eod_token = content["config"], content["eod_token"]
        self._tokenizer = tokenizers.Tokenizer.from_str(content["model"])
        # Stored settings of another use: a limit on the length would cut documents without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None  # other ids at every call

    def _fast_model(self) -> str:
        return self._tokenizer.to_str()

    def _check_texts(self) -> Iterable[str]:
        yield from CHECK_TEXTS
        for token in self._tokenizer.get_added_tokens_decoder().values():
            yield f"{token.content} a{token.content}b {token.content} 。{token.content}{token.content}"

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
    def _control_ids(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def control_id(self, text: str) -> int | None:
        """The id of an added token that is marked as special; None when there is none of that name."""
        return self._control_ids.get(text)

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

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_flat(self, texts: list[str]) -> FlatIds:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return flatten([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and its configuration (chat template included) into ``folder``.

        Raises:
            DataError: they cannot be written.
        """
        save_huggingface(Path(folder), self._tokenizer, {**self._config, "eos_token": self._eod_token})


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


def save_huggingface(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Write a tokenizer and its configuration as transformers reads them.

    Raises:
        DataError: they cannot be written.
    """
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
