"""Tokenizers of the Hugging Face ecosystem: a folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers

from steel_megatron.config import TokenizerEngine, TokenizerKind
from steel_megatron.data.tokenizing.base import TokenizerBase, flatten
from steel_megatron.data.tokenizing.control_tokens import (
    mark_control_tokens,
    named_tokens,
    out_of_reach,
    token_text,
    unknown_id,
    within_reach,
)
from steel_megatron.data.tokenizing.gigatoken_engine import CHECK_TEXTS, FlatIds
from steel_megatron.data.tokenizing.remembered import content_of, key_of, recall, remember
from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, write_atomically

GPT2_EOD = "<|endoftext|>"
"""What ends a document in GPT-2's vocabulary."""


_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_LARGEST = 1 << 28
"""Bytes of a file of a tokenizer; larger ones are something else."""


class HuggingFaceTokenizer(TokenizerBase):
    """A tokenizer of the Hugging Face ecosystem, run by the ``tokenizers`` library or by gigatoken.

    Args:
        path: a folder that holds ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``; and
            ``tokenizer_config.json`` or ``special_tokens_map.json``. Or the path of a ``tokenizer.json``, of
            whatever name, with the other two next to it.
        eod_token: the token that ends a document; by default the configuration's ``eos_token``.
        engine: what encodes many texts.

    Raises:
        DataError: a file is missing or damaged; the end-of-document token is not named or not known; or plain text
            gives a control token whatever is done.
    """

    kind: TokenizerKind = "huggingface"

    def __init__(self, path: str | Path, eod_token: str | None = None, engine: TokenizerEngine = "auto") -> None:
        path = Path(path)
        if not path.exists():
            raise DataError(f"tokenizer {path} does not exist; it must be a folder or a tokenizer.json")
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            _refuse_folder_without_tokenizer(path)
        config = _read_config(folder)
        eod = eod_token or token_text(config.get("eos_token"))
        if eod is None:
            raise DataError(
                f"{folder}/tokenizer_config.json names no eos_token, which ends a document here; write it there, or "
                "name the token as eod_token"
            )
        key = key_of("Hugging Face tokenizer", eod, content_of(_files_of(path)))
        if (known := recall(key)) is not None:
            facts, content = known
            plain = orjson.dumps(out_of_reach(orjson.loads(content))).decode() if facts["reached"] else None
            made_of = {"model": content, "plain": plain, "config": config, "eod_token": eod}
            super().__init__(f"the tokenizer in {path}", made_of, engine)
            self.__dict__.update({name: facts[name] for name in ("fingerprint", "vocab_size")})
            return
        content, reached = self._examine(path, config, eod, engine)
        facts = {"reached": reached, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}
        remember(key, facts, content)

    def _examine(self, path: Path, config: dict[str, Any], eod: str, engine: TokenizerEngine) -> tuple[str, bool]:
        """Set up from the files, and check that plain text gives no control token.

        Returns:
            the content of its ``tokenizer.json``, and whether the model itself can find control tokens in a text.
        """
        model = _from_folder(path) if path.is_dir() else _from_file(path)
        _add_configured_tokens(model, config, path if path.is_dir() else path.parent)
        eod_id = model.token_to_id(eod)
        if eod_id is None:
            raise DataError(f"{path}: the end-of-document token {eod!r} is not in the vocabulary")
        content = model.to_str()
        stored = orjson.loads(content)
        if mark_control_tokens(stored, eod, eod_id, named_tokens(config)):
            content = orjson.dumps(stored).decode()
        reached = within_reach(stored)
        plain = orjson.dumps(out_of_reach(stored)).decode() if reached else None
        made_of = {"model": content, "plain": plain, "config": config, "eod_token": eod}
        super().__init__(f"the tokenizer in {path}", made_of, engine)
        # What the vocabulary does not have is written as the unknown token, which is no harm unless it ends a document.
        unknown = unknown_id(stored)
        control = {name: index for name, index in self._control_ids.items() if index != unknown or name == eod}
        self._check_plain_text(control, reached)
        return content, bool(reached)

    def _content(self) -> dict[str, Any]:
        return self._made_of

    def _load(self, content: dict[str, Any]) -> None:
        self._made_of = content
        self._config, self._eod_token = content["config"], content["eod_token"]
        self._tokenizer = self._plain = _as_it_is(content["model"])
        if content["plain"] is not None:
            self._plain = _as_it_is(content["plain"])

    def _fast_model(self) -> str:
        return self._plain.to_str()

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

    @property
    def chat_template(self) -> str | None:
        """The template of ``chat_template.jinja`` or ``tokenizer_config.json``; of several, the default."""
        found = self._config.get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    @property
    def named_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as templates call them, as far as there are any."""
        named = {name: token_text(self._config.get(name)) for name in ("bos_token", "eos_token")}
        return {name: text for name, text in named.items() if text}

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of all control tokens by name."""
        return self._control_ids

    def control_id(self, text: str) -> int | None:
        """The id of an added token that is marked as special; None when there is none of that name."""
        return self._control_ids.get(text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of vocabulary, merges, text normalisation and added tokens, however they are stored."""
        stored = orjson.loads(self._tokenizer.to_str())
        parts = {name: stored[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        if "merges" in parts["model"]:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in parts["model"]["merges"]]
            parts["model"]["merges"] = pairs
        canonical = json.dumps({**parts, "eod_token": self._eod_token}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _encode_flat(self, texts: list[str]) -> FlatIds:
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return flatten([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and its configuration (chat template included) into ``folder``.

        Raises:
            DataError: they cannot be written.
        """
        save_as_trained(Path(folder), self._tokenizer, self._config, self._eod_token)


def _files_of(path: Path) -> list[Path]:
    """The files that may decide what a tokenizer is: transformers looks at more than it names."""
    if not path.is_dir():
        return [path, *(path.parent / name for name in _CONFIGS)]
    if (path / "tokenizer.json").exists():
        return [path / name for name in ("tokenizer.json", *_CONFIGS)]
    found = (file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    return sorted(file for file in found if file.stat().st_size <= _LARGEST)


def _as_it_is(model: str) -> tokenizers.Tokenizer:
    """A tokenizer from the content of its file, without settings of another use that may be stored there."""
    tokenizer = tokenizers.Tokenizer.from_str(model)
    tokenizer.no_truncation()  # a limit on the length would cut documents without a word
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, tokenizers.models.BPE):
        tokenizer.model.dropout = None  # other ids at every call
    return tokenizer


def _refuse_folder_without_tokenizer(folder: Path) -> None:
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        return
    models = sorted(path.name for path in folder.glob("*.model"))
    if models:
        raise DataError(f"{folder} has no tokenizer.json; its {models[0]} is of kind sentencepiece: name that file")
    weights = " (it holds a model without one)" if (folder / "config.json").exists() else ""
    raise DataError(
        f"{folder} holds no tokenizer{weights}: it has neither tokenizer.json nor vocab.json and merges.txt"
    )


def _add_configured_tokens(model: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Add the tokens that only ``added_tokens_decoder`` of ``tokenizer_config.json`` has, as transformers does.

    Raises:
        DataError: such a token cannot get the id that it has there.
    """
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    known = set(model.get_added_tokens_decoder())
    tokens = {int(index): token for index, token in listed.items() if str(index).isdecimal() and token_text(token)}
    for index, token in sorted(tokens.items()):
        content = token_text(token)
        assert content is not None
        if index in known and model.id_to_token(index) == content:
            continue
        flags = {
            name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
        }
        model.add_tokens([tokenizers.AddedToken(content, **flags)])
        given = model.token_to_id(content)
        if given != index:
            raise DataError(
                f"{folder}/tokenizer_config.json gives {content!r} the id {index}; with the tokenizer next to it, it "
                f"gets {given}: they are of different models"
            )


def _from_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust extension raises bare Exceptions
        hint = "; a .model file is of kind sentencepiece" if path.suffix == ".model" else ""
        raise DataError(f"{path} cannot be loaded as a tokenizer.json: {error}{hint}") from error


def _from_folder(folder: Path) -> tokenizers.Tokenizer:
    """The content of ``tokenizer.json``, made from the older pair of files where it is missing."""
    if (folder / "tokenizer.json").exists():
        return _from_file(folder / "tokenizer.json")
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]
    if missing:
        raise DataError(f"{folder} has neither tokenizer.json nor {' and '.join(missing)}")
    _refuse_empty_merges(folder / "merges.txt")
    # Only this rare form needs transformers, which takes a second to import and brings torch along.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust extension raises bare Exceptions
        raise DataError(
            f"the tokenizer in {folder} cannot be loaded: {error} (vocab.json, merges.txt or tokenizer_config.json is "
            "damaged, or they are of different models)"
        ) from error
    return loaded.backend_tokenizer


def save_gpt2(vocab_file: Path, merge_file: Path, folder: Path, eod_token: str = GPT2_EOD) -> None:
    """Write GPT-2's pair of files, of whatever names, as a folder for :class:`HuggingFaceTokenizer`.

    Args:
        vocab_file: a JSON object of ids by token.
        merge_file: two tokens a line, best first.
        folder: gets a ``tokenizer.json`` and its configuration.
        eod_token: the token that ends a document.

    Raises:
        DataError: a file is missing or damaged, or has no such token; or the folder cannot be written.
    """
    _refuse_empty_merges(merge_file)
    try:
        bpe = tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file))
    except Exception as error:  # the Rust extension raises bare Exceptions
        raise DataError(f"{vocab_file} and {merge_file} cannot be loaded as GPT-2's files: {error}") from error
    built = tokenizers.Tokenizer(bpe)
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    if built.token_to_id(eod_token) is None:
        raise DataError(f"{vocab_file} has no token {eod_token!r}, which would end a document; name another one")
    save_huggingface(folder, built, {"eos_token": eod_token})


def _refuse_empty_merges(path: Path) -> None:
    """Without merges every byte would be a token: legal, and surely not meant."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not any(line.strip() and not line.startswith("#version") for line in lines):
        raise DataError(f"{path} holds no merges; it is empty or cut off: get it anew")


def save_huggingface(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Write a tokenizer and its configuration as transformers reads them.

    Args:
        folder: gets ``tokenizer.json`` and ``tokenizer_config.json``; made if it does not exist.
        tokenizer: the tokenizer.
        config: content of ``tokenizer_config.json``; the tokenizer's class is set here, and ``auto_map`` left out.

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


def save_as_trained(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], eod_token: str) -> None:
    """Write a tokenizer that gives a text the ids that training saw: nothing before it, and no other token after it.

    A beginning-of-sequence token is left out, since no corpus has one: evaluation would score texts after it.

    Args:
        folder: gets the files of :func:`save_huggingface`.
        tokenizer: the tokenizer; not changed.
        config: content of ``tokenizer_config.json``.
        eod_token: the token that ends a document; it also pads where the configuration names no token for that.

    Raises:
        DataError: they cannot be written.
    """
    stored = json.loads(tokenizer.to_str())
    processor = stored["post_processor"] or {}
    parts = [part for part in (processor, *processor.get("processors", ())) if part.get("type") == "ByteLevel"]
    stored["post_processor"] = parts[0] if parts else None  # it only trims offsets; the others add tokens
    config = {name: value for name, value in config.items() if name != "bos_token"}
    config |= {"eos_token": eod_token, "pad_token": token_text(config.get("pad_token")) or eod_token}
    config |= {"add_bos_token": False, "add_eos_token": False}
    save_huggingface(folder, tokenizers.Tokenizer.from_str(json.dumps(stored)), config)


def _read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, and from ``special_tokens_map.json``, as GPT-2 has it, what is not named there."""
    found = [_read_json(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    named = {name: token_text(value) or value for name, value in found[0].items()}
    if (template := folder / "chat_template.jinja").exists():  # where transformers writes it today
        with disk_errors("read", template, DataError):
            found[1]["chat_template"] = template.read_text(encoding="utf-8")
    return {**named, **{name: value for name, value in found[1].items() if value is not None or name not in named}}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a JSON object was expected")
    return content
