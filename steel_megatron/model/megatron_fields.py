"""The escape hatch: fields of megatron-core's own configs that the library has no setting for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

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
        ConfigError: there is no such field, the library sets it, or megatron-core refuses the value.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    fields = {name for name in known if not name.startswith("_")}
    for name, value in further.items():
        if name in own:
            raise ConfigError(
                f"{option}.{name} = {value!r}: the library sets this field itself, to {own[name]!r}; use its own option"
            )
        if name not in fields:
            free = ", ".join(sorted(fields - set(own)))
            raise ConfigError(f"{option}.{name} = {value!r}: {kind.__name__} has no such field; it has {free}")
    try:
        return kind(**own, **further)
    except (TypeError, ValueError, AssertionError) as error:
        if not further:
            raise
        given = ", ".join(f"{name} = {value!r}" for name, value in further.items())
        raise ConfigError(f"megatron-core refuses {option} with {given}: {error}") from error
