"""Checks that the configs share; each message has the field, its value and what would be right."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, get_type_hints

from steel_megatron.config.loading import described, is_a
from steel_megatron.errors import ConfigError

NO_PATHS = ("prompts", "json_keys", "text_key", "eod_token", "names", "weights", "mixture", "domain")
"""Texts that are no paths: a ``~`` in them stays."""


def with_homes(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by name in which ``~/`` and ``~user/`` at the beginning of paths, and of those in ``SOURCE=PATH``, are
    replaced by the home folder."""
    return {name: value if name in NO_PATHS else _with_home(value) for name, value in values.items()}


def _with_home(value: Any) -> Any:
    if isinstance(value, str):
        source, equals, path = value.partition("=")
        if equals and path.startswith("~") and "/" not in source:
            return f"{source}={os.path.expanduser(path)}"
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return {name: _with_home(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def typed(owner: Any) -> None:
    """Replace ``~`` in a config's paths, and check the types of its fields.

    Raises:
        ConfigError: for the first field that holds a value of another type than it is to have.
    """
    hints = get_type_hints(type(owner))
    for name, value in with_homes(vars(owner)).items():
        if value != getattr(owner, name):
            object.__setattr__(owner, name, value)
    for field in dataclasses.fields(owner):
        value, hint = getattr(owner, field.name), hints[field.name]
        if not is_a(value, hint):
            raise ConfigError(f"{type(owner).__name__}.{field.name} is {value!r}; it must be {described(hint)}")


def at_least(minimum: float, owner: object, *names: str) -> None:
    """Raise a ConfigError for the first of ``owner``'s fields that is below ``minimum``."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not minimum <= value < float("inf"):  # refuses NaN as well
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be at least {minimum} and finite")


def at_most(maximum: int, owner: object, *names: str) -> None:
    """Raise a ConfigError for the first of ``owner``'s fields that is above ``maximum``."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value > maximum:
            raise ConfigError(f"{type(owner).__name__}.{name} is {str(value)[:40]}; it must be at most {maximum:,}")


def below_one(owner: object, *names: str) -> None:
    """Raise a ConfigError for the first of ``owner``'s fields that is no probability below 1."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < 1:  # refuses NaN as well
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be at least 0 and below 1")


def one_of(allowed: tuple[str, ...], owner: object, name: str) -> None:
    """Check that a field has one of the allowed values.

    Args:
        allowed: the values.
        owner: the config.
        name: the field.

    Raises:
        ConfigError: it has another value.
    """
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; it must be one of {', '.join(allowed)}")


def divides(divisor: int, divisor_name: str, value: int, value_name: str) -> None:
    """Check that one number divides another.

    Args:
        divisor: the number that must divide ``value``.
        divisor_name: its name in the message.
        value: the number to be divided.
        value_name: its name in the message.

    Raises:
        ConfigError: there is a remainder.
    """
    if value % divisor:
        raise ConfigError(f"{value_name} = {value} is not divisible by {divisor_name} = {divisor}")
