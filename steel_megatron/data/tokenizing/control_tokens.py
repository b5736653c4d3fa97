"""Control tokens of a Hugging Face tokenizer: which they are, and how plain text is kept from giving their ids.

Both work on the parsed content of a ``tokenizer.json`` as the ``tokenizers`` library writes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")


def token_text(token: object) -> str | None:
    """A token of ``tokenizer_config.json``, which is written as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def named_tokens(config: Mapping[str, Any]) -> set[str]:
    """The tokens to which a ``tokenizer_config.json`` gives a part to play, or which it calls special."""
    tokens = [config.get(name) for name in _NAMED]
    for name in _NAMED_LISTS:
        listed = config.get(name)
        tokens += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
    decoder = config.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, dict) else ():
        tokens += [token] if isinstance(token, dict) and token.get("special") is True else ()
    return {text for token in tokens if (text := token_text(token))}


def mark_control_tokens(stored: dict[str, Any], eod: str, eod_id: int, named: set[str]) -> bool:
    """Mark the end of a document, and those added tokens that are ``named``, as special.

    A token that is added and not special is found in any text, as is one that is a plain word of the vocabulary.

    Args:
        stored: the parsed ``tokenizer.json``; changed in place.
        eod: the token that ends a document; added if it is only a word of the vocabulary.
        eod_id: its id.
        named: other tokens to mark, as :func:`named_tokens` gives them.

    Returns:
        Whether anything has changed.
    """
    changed = [token for token in stored["added_tokens"] if token["content"] in {eod, *named} and not token["special"]]
    for token in changed:
        token["special"] = True
    if any(token["content"] == eod for token in stored["added_tokens"]):
        return bool(changed)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    stored["added_tokens"].append({"id": eod_id, "content": eod, **flags})
    stored["added_tokens"].sort(key=lambda token: token["id"])
    return True


def unknown_id(stored: Mapping[str, Any]) -> int | None:
    """The id that stands for what the vocabulary does not have; None if there is none."""
    model = stored["model"]
    return model.get("unk_id") if model["type"] == "Unigram" else model["vocab"].get(model.get("unk_token"))


def within_reach(stored: Mapping[str, Any]) -> set[str]:
    """The special tokens that the model itself can find in a text, added token or not.

    A model of words or of likely pieces (the layout of T5, XLM-R, BERT) finds whatever its vocabulary holds. A BPE
    finds what its merges make.
    """
    model = stored["model"]
    names = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()
    special = {token["content"] for token in stored["added_tokens"] if token["special"]} & names
    if not special or model["type"] != "BPE" or model.get("ignore_merges"):
        return special
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    made = {_merged(merge, prefix) for merge in model["merges"]}
    return {name for name in special if name in made or len(name.removeprefix(prefix).removesuffix(suffix)) == 1}


def out_of_reach(stored: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for plain text: the same ids, but special tokens have names that nobody can guess.

    Cutting a text at their spelling would not do: a model sees it after normalisation, which may have made a
    control token out of other characters (a full-width ``＜/s＞``).
    """
    names = {token["content"]: secrets.token_hex(16) for token in stored["added_tokens"] if token["special"]}
    model = dict(stored["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
        model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge for merge in model["merges"] if not {*_pair(merge), _merged(merge, prefix)} & names.keys()
        ]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in stored["added_tokens"]]
    return {**stored, "model": model, "added_tokens": added, "post_processor": None}


def _pair(merge: str | list[str]) -> list[str]:
    """The two halves of a merge, which older files write as one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _merged(merge: str | list[str], prefix: str) -> str:
    """What a merge makes; ``prefix`` marks pieces that continue a word."""
    left, right = _pair(merge)
    return left + right.removeprefix(prefix)
