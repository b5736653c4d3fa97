"""Messages for wrong options: the value, where it was given, and what it must be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from steel_megatron.config import ModelConfig
from steel_megatron.config.loading import described
from steel_megatron.errors import ConfigError

_KEY = re.compile(r'Parser key "([^"]+)": (.*)')
_VALUE = re.compile(r"(?:Got|Given) value: (?!.*(?:Got|Given) value: )(.*)")
_NESTED = re.compile(r"NestedArg\(key='(.*?)', val=(.*)\)")


def explain(
    message: str, arguments: Sequence[str], kinds: dict[str, Any], failure: Callable[[list[str]], str | None]
) -> str:
    """Rewrite jsonargparse's message.

    Args:
        message: its message, in one line.
        arguments: of the command line.
        kinds: type of each option of the command; empty where there is no such command.
        failure: parses arguments and returns the message of the failure, if they fail.
    """
    file = _file_at_fault(message, arguments, failure)
    found = _KEY.match(message)
    if found is None:
        return f"{message}; settings from {file}" if file and "required" not in message else message
    key, rest = found.groups()
    kind = _kind_of(key.split("."), kinds)
    value = _VALUE.search(rest)
    shown = value.group(1) if value else ""
    nested = _NESTED.match(shown)
    if nested:
        key, shown = f"{key}.{nested.group(1)}", nested.group(2)
        kind = next((get_args(part)[1] for part in _parts(kind) if get_origin(part) is dict), None)
    subject = f"{key} in {file}" if file else f"--{key}"
    if not value or kind is None:
        return f"{subject}: {rest}"
    wanted = described(kind)
    hint = "; on the command line a list is written '[A, B]'" if "a list" in wanted and not file else ""
    return f"{subject} is {shown}; it must be {wanted}{hint}"


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


def _file_at_fault(message: str, arguments: Sequence[str], failure: Callable[[list[str]], str | None]) -> str | None:
    """The --config file that alone leads to the same failure."""
    first = next((number for number, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    command = list(arguments[:first])
    for number, word in enumerate(arguments):
        name, equals, file = word.partition("=")
        if name == "--config":
            file = file if equals else " ".join(arguments[number + 1 : number + 2])
            if failure([*command, "--config", file]) == message:
                return file
    return None


def _kind_of(path: Sequence[str], kinds: dict[str, Any]) -> Any:
    """The type of an option by its dotted name."""
    kind = kinds.get(path[0])
    for name in path[1:]:
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = get_type_hints(kind).get(name)
    return kind


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
