"""What a model's tokenizer does with texts and conversations, be it the library's or an exported one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from steel_megatron.config import TokenizerKind, load_yaml
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.reading.chunks import BadRow
from steel_megatron.data.reading.conversations import Turn
from steel_megatron.data.reading.sources import MARKS, SYSTEM_PROMPT
from steel_megatron.data.tokenizing.chat_template import ChatTemplate
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, encode_dialogue, find_tokenizer, load_tokenizer
from steel_megatron.errors import CheckpointError, ConfigError, DataError
from steel_megatron.train.checkpoint_manifest import MANIFEST
from steel_megatron.train.model_path import find_checkpoint

Messages = list[dict[str, str]]
"""A conversation: each turn's ``role`` (system, user, assistant) and ``content``."""


@dataclass(frozen=True)
class Texts:
    """What a model's tokenizer does.

    Attributes:
        encode: the ids of a text; of a rendered conversation, its marks become control tokens.
        decode: the text of ids, without control tokens.
        render: the text of a conversation, up to where the assistant replies; with False, up to the end of its last
            turn, which goes on.
        ends: the tokens that end a reply.
        first_id: the token before a text that stands alone.
        identity: of all that decides about ids.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    render: Callable[[Messages, bool], str]
    ends: frozenset[int]
    first_id: int
    identity: str


def finetuned(checkpoint: Path) -> bool:
    """Whether a checkpoint was trained on corpora of ``sft prepare`` or ``dpo prepare``.

    Raises:
        DataError: its ledger is damaged.
    """
    ledger = checkpoint / "ledger.json"
    return ledger.exists() and Ledger.load(ledger).history.labelled


def texts_of_tokenizer(tokenizer: Tokenizer, chat: bool = False, finetuned: bool = False) -> Texts:
    """The library's tokenizer; conversations are as in training: in ChatML, the template of pretraining's dialogues,
    or as ``sft prepare`` renders them.

    Args:
        tokenizer: the model's.
        chat: whether conversations are to be encoded.
        finetuned: whether the model was trained on corpora of ``sft prepare`` or ``dpo prepare``.

    Raises:
        ConfigError: it has no marks of ChatML.
        DataError: it has no chat template either.
    """
    plain = Texts(
        tokenizer.encode,
        tokenizer.decode,
        chatml,
        frozenset({tokenizer.eod_id}),
        tokenizer.eod_id,
        tokenizer.fingerprint,
    )
    if not chat:
        return plain
    if finetuned:
        return _texts_of_template(ChatTemplate(tokenizer), plain)
    marks = [tokenizer.control_id(mark) for mark in MARKS]
    if None in marks:
        raise ConfigError(
            f"the model's tokenizer has no control token {MARKS[marks.index(None)]}, so it was not trained on "
            "conversations; leave --chat out"
        )
    return Texts(
        lambda text: encode_dialogue(tokenizer, text).tolist(),
        tokenizer.decode,
        chatml,
        plain.ends | {end for end in marks[1:] if end is not None},
        plain.first_id,
        f"{tokenizer.fingerprint} chat",
    )


def _texts_of_template(template: ChatTemplate, plain: Texts) -> Texts:
    """Conversations as ``sft prepare`` renders them."""

    def render(messages: Messages, add_generation_prompt: bool = True) -> str:
        turns = [Turn(one["role"], one["content"]) for one in messages]
        try:
            return template.prompt(turns, add_generation_prompt)
        except BadRow as error:
            raise ConfigError(str(error)) from None

    ends, identity = plain.ends | template.ends, f"{plain.identity} {template.source}"
    return Texts(template.ids_of, plain.decode, render, ends, plain.first_id, identity)


def chatml(messages: Messages, add_generation_prompt: bool = True) -> str:
    """A conversation in ChatML, with the system prompt of training where it has none.

    Args:
        messages: the turns.
        add_generation_prompt: whether the assistant is to reply; if not, the last turn goes on.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    start, end = MARKS
    text = "\n".join(f"{start}{one['role']}\n{one['content']}{end}" for one in messages)
    return f"{text}\n{start}assistant\n" if add_generation_prompt else text.removesuffix(end)


def _ends_of_generation(path: Path) -> list[int]:
    """The tokens that end a reply by an exported folder's ``generation_config.json``."""
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)]


def texts_of_folder(path: Path, chat: bool = False) -> Texts:
    """The tokenizer of an exported folder as transformers reads it, with its own chat template.

    Args:
        path: the folder.
        chat: whether conversations are to be encoded.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it has no chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    from steel_megatron.hf.configuration_steel import SteelConfig

    try:
        # transformers then knows the settings, and asks nobody on stdin whether it may run the folder's own code.
        AutoConfig.register("steel", SteelConfig, exist_ok=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers' own are nothing more special
        raise CheckpointError(
            f"the tokenizer of {path} cannot be read: {error}; name one with --tokenizer_path"
        ) from None
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer of {path} has no end-of-text token (eos_token)")
    if chat and not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {path} has no chat template; leave --chat out")

    def render(messages: Messages, add_generation_prompt: bool = True) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    mark = tokenizer.decode(first)

    def encode(text: str) -> list[int]:
        """With what the tokenizer puts around a text, unless a chat template has put it there."""
        ids: list[int] = tokenizer.encode(text, add_special_tokens=not text.startswith(mark))
        return ids

    ends = {tokenizer.eos_token_id, *_ends_of_generation(path)}
    if chat and (end := tokenizer.get_vocab().get(MARKS[1])) is not None:
        ends.add(end)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    identity = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template if chat else ''}"
    return Texts(encode, decode, render, frozenset(ends), first, identity)


def tokenizer_of_folder(path: Path) -> tuple[TokenizerKind, str]:
    """The tokenizer that was exported with a model."""
    if not any((path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise CheckpointError(f"{path} was exported without a tokenizer; name it with --tokenizer_path")
    return "huggingface", str(path)


def tokenizer_of_run(path: Path) -> Tokenizer:
    """The tokenizer named in the run.yaml of a checkpoint."""
    try:
        data = load_yaml((path / "run.yaml").read_text(encoding="utf-8"))["data"]
        kind, tokenizer_path = data["tokenizer_kind"], data["tokenizer_path"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        kind = tokenizer_path = None
    if not isinstance(kind, str) or not isinstance(tokenizer_path, str):
        raise CheckpointError(
            f"{path / 'run.yaml'} does not say which tokenizer the model was trained with; name it with "
            "--tokenizer_path"
        )
    try:
        ledger = path / "ledger.json"
        fingerprint = Ledger.load(ledger).history.tokenizer if ledger.exists() else None
        return find_tokenizer(kind, tokenizer_path, path, fingerprint)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(
            f"{error} (named in {path / 'run.yaml'}, relative to where the run was started; name it with "
            "--tokenizer_path)"
        ) from None


def tokenizer_named(kind: TokenizerKind, path: str) -> Tokenizer:
    """The tokenizer that a path names: its own folder or file, or a model's that has one.

    Args:
        kind: of a tokenizer's folder or file; a run and a checkpoint say theirs.
        path: a tokenizer, an exported folder, a checkpoint, or a run's folder, whose newest checkpoint is taken.

    Raises:
        CheckpointError: the run has no whole checkpoint, or does not say which tokenizer it was trained with.
        DataError: the tokenizer cannot be loaded.
    """
    if (Path(path) / "checkpoints").is_dir() or (Path(path) / MANIFEST).is_file():
        return tokenizer_of_run(find_checkpoint(path).path)
    return load_tokenizer(kind, path)
