"""Configs as plain values and YAML, apart from what they mean."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import yaml

from steel_megatron.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries and lists, as it stands in YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], origin: str) -> Any:
    """Build a config dataclass from plain values.

    Args:
        kind: the dataclass to build.
        values: what :func:`to_dict` gave; nested sections are dictionaries.
        origin: where the values came from, for the message.

    Raises:
        ConfigError: a key is unknown or a value is out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{origin}: unknown key {unknown[0]!r} in {kind.__name__}; it has {', '.join(fields)}")
    sections: dict[str, Any] = {
        name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)
    }
    built = {
        name: from_dict(sections[name], value, origin) if name in sections else value for name, value in values.items()
    }
    return kind(**built)


def dump_yaml(config: Any) -> str:
    """A config as YAML text that :func:`from_dict` and the command line read back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
