"""What a model's tokenizer does with texts and conversations, be it the library's or an exported one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steel_megatron.data.reading.sources import MARKS, SYSTEM_PROMPT
from steel_megatron.data.tokenizing.tokenizer import Tokenizer, encode_dialogue
from steel_megatron.errors import CheckpointError, ConfigError

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


def texts_of_tokenizer(tokenizer: Tokenizer, chat: bool = False) -> Texts:
    """The library's tokenizer; conversations are in ChatML, the template of the dialogues that it is trained on.

    Args:
        tokenizer: the model's.
        chat: whether conversations are to be encoded.

    Raises:
        ConfigError: it has no marks of ChatML.
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
    except (OSError, ValueError, KeyError) as error:
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

    ends = {tokenizer.eos_token_id}
    if chat and (end := tokenizer.get_vocab().get(MARKS[1])) is not None:
        ends.add(end)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    identity = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template if chat else ''}"
    return Texts(encode, decode, render, frozenset(ends), first, identity)
