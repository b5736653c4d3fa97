"""Messages for wrong options: the value, where it was given, and what it must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steel_megatron.cli.options import Option, find
from steel_megatron.config import ModelConfig
from steel_megatron.config.loading import described
from steel_megatron.errors import ConfigError

_KEY = re.compile(r'Parser key "([^"]+)": (.*)')
_VALUE = re.compile(r"(?:Got|Given) value: (?!.*(?:Got|Given) value: )(.*)")
_NESTED = re.compile(r"NestedArg\(key='(.*?)', val=(.*)\)")


def explain(message: str, settings: Mapping[str, Option]) -> str:
    """Rewrite jsonargparse's message on a value of the command line.

    Args:
        message: its message, in one line.
        settings: the options of the command by dotted name.
    """
    found = _KEY.match(message)
    if found is None:
        return message
    key, rest = found.groups()
    value = _VALUE.search(rest)
    shown = value.group(1) if value else ""
    nested = _NESTED.match(shown)
    if nested:
        key, shown = f"{key}.{nested.group(1)}", nested.group(2)
    option = find(settings, key)
    if not value or option is None:
        return f"--{key}: {rest}"
    return f"--{key} is {shown}; it must be {described(option.kind)}"


def refuse_old_and_new_name(options: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Refuse a new name on the command line that would lose to the old name in a file.

    Raises:
        ConfigError: a setting of the model has both.
    """
    given = {word.partition("=")[0] for word in arguments}
    for old, new in ModelConfig.RENAMED.items():
        value = (options.get("model") or {}).get(old)
        if f"--model.{new}" in given and value is not None:
            raise ConfigError(f"--model.{new} is given and so is its old name, model.{old} = {value}; rename that one")
