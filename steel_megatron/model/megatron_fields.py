"""The escape hatch: fields of megatron-core's own configs that the library has no setting for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from steel_megatron.config.loading import described, is_a
from steel_megatron.errors import ConfigError

Config = TypeVar("Config")


def with_further_fields(kind: type[Config], own: Mapping[str, Any], further: Mapping[str, Any], option: str) -> Config:
    """Build one of megatron-core's configs from what the library sets and what a user adds.

    Args:
        kind: the dataclass of megatron-core.
        own: fields that the library sets, by name.
        further: fields that the user adds.
        option: the option they came from, for the message.

    Raises:
        ConfigError: there is no such field, the library sets it, the value is of another type, or megatron-core
            refuses it.
    """
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    fields = {name for name in known if not name.startswith("_")}
    hints = get_type_hints(kind)
    for name, value in further.items():
        if name in own:
            raise ConfigError(
                f"{option}.{name} = {value!r}: the library sets this field itself, to {own[name]!r}; use its own option"
            )
        if name not in fields:
            free = ", ".join(sorted(fields - set(own)))
            raise ConfigError(f"{option}.{name} = {value!r}: {kind.__name__} has no such field; it has {free}")
        if _is_plain(hints[name]) and value != known[name].default and not is_a(value, hints[name]):
            raise ConfigError(f"{option}.{name} = {value!r}; it must be {described(hints[name])}")
    with refusals(further, option):
        return kind(**own, **further)


def _is_plain(hint: Any) -> bool:
    """Whether a field's type is one that YAML has; the others are megatron-core's to check."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType, list):
        return all(map(_is_plain, parts))
    return kind is Literal or hint in (bool, int, float, str, NoneType)


@contextmanager
def refusals(further: Mapping[str, Any], option: str) -> Iterator[None]:
    """What megatron-core refuses to build while a user's fields are there is an error of the user.

    Args:
        further: fields that the user added.
        option: the option they came from, for the message.

    Raises:
        ConfigError: it refuses.
    """
    try:
        yield
    except (TypeError, ValueError, AssertionError) as error:
        if not further:
            raise
        given = ", ".join(f"{name} = {value!r}" for name, value in further.items())
        raise ConfigError(f"megatron-core refuses {option} with {given}: {error}") from error
