"""Configs, and other dataclasses, as plain values and YAML, apart from what they mean."""

from __future__ import annotations

import dataclasses
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from steel_megatron.errors import ConfigError


class RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key twice, of which PyYAML alone would drop the first."""

    def __init__(self, key: str, first: int, line: int) -> None:
        super().__init__(f"line {line}: {key} is given twice, first in line {first}; leave one of them out")
        self.key, self.first, self.line = key, first, line


class YamlLoader(yaml.SafeLoader):
    """YAML as of version 1.2, where ``1e-3`` is a number (to PyYAML alone it is text), and no key is there twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take up what ``<<`` names; before that, every key must be there once.

        Args:
            node: the mapping.

        Raises:
            RepeatedKeyError: a key is there twice.
        """
        if node in self._checked:  # what << added may stand beside a key of the mapping's own
            return
        self._checked.add(node)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise RepeatedKeyError(key.value, lines[name], line)
                lines[name] = line
        super().flatten_mapping(node)


def load_yaml(text: str) -> Any:
    """What YAML says, as plain values.

    Args:
        text: YAML of one document.

    Raises:
        YAMLError: it is broken, or a mapping has a key twice.
    """
    return yaml.load(text, YamlLoader)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries and lists, as in YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], origin: str) -> Any:
    """Build a dataclass from plain values.

    Args:
        kind: the dataclass to build.
        values: what :func:`to_dict` gave; nested sections are dictionaries.
        origin: where the values came from, for the message; empty where the caller adds it.

    Raises:
        ConfigError: a key is unknown, or a value is of another type than its field or out of range.
    """
    fields = [field.name for field in dataclasses.fields(kind)]
    hints, where, built = get_type_hints(kind), f"{origin}: " if origin else "", {}
    old_names = {name: hint.type for name, hint in hints.items() if isinstance(hint, dataclasses.InitVar)}
    hints |= old_names
    renamed: dict[str, str] = getattr(kind, "RENAMED", {})
    for given, value in values.items():
        # Settings saved by an earlier version have the old name alone. The command line gives both, one of them unset.
        name = renamed[given] if given in renamed and renamed[given] not in values else given
        if name not in fields and name not in old_names:
            raise ConfigError(f"{where}unknown key {name!r} in {kind.__name__}; it has {', '.join(fields) or 'none'}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = from_dict(hint, value, origin)  # type: ignore[arg-type]
        if not is_a(value, hint):
            raise ConfigError(f"{where}{name} is {value!r}; it must be {described(hint)}")
        built[name] = tuple(value) if get_origin(hint) is tuple else value
    return kind(**built)


def is_a(value: object, hint: Any) -> bool:
    """Whether a plain value is of the type that a hint names; a whole number is a float as well, true is no number."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal or hint is Any:
        return hint is Any or value in parts
    if kind in (Union, UnionType):
        return any(is_a(value, part) for part in parts)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple)) and all(is_a(entry, parts[0]) for entry in value)
    if kind is dict:
        return isinstance(value, dict) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
    if bool in (hint, type(value)):
        return hint is type(value)
    return isinstance(value, (int, float) if hint is float else hint)


def described(hint: Any) -> str:
    """A type hint in words, as in "it must be of type int or null"."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join("null" if part is NoneType else described(part) for part in parts)
    if kind in (list, tuple):
        some = get_origin(parts[0]) is Literal
        return f"a list of {'some of ' + ', '.join(get_args(parts[0])) if some else parts[0].__name__}"
    if kind is dict:
        return f"a dictionary with keys of type {parts[0].__name__}" + (
            "" if parts[1] is Any else f", each {described(parts[1])}"
        )
    return f"one of {', '.join(map(str, parts))}" if kind is Literal else f"of type {hint.__name__}"


def dump_yaml(config: Any) -> str:
    """A config as YAML text that :func:`from_dict` and the command line read back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
