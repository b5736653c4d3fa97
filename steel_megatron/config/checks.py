"""Checks that the configs share; each message has the field, its value and what would be right."""

from __future__ import annotations

from steel_megatron.errors import ConfigError


def at_least(minimum: float, owner: object, *names: str) -> None:
    """Raise a ConfigError for the first of ``owner``'s fields that is below ``minimum``."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not minimum <= value < float("inf"):  # refuses NaN as well
            raise ConfigError(f"{type(owner).__name__}.{name} is {value}; it must be at least {minimum} and finite")


def one_of(allowed: tuple[str, ...], owner: object, name: str) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; it must be one of {', '.join(allowed)}")


def divides(divisor: int, divisor_name: str, value: int, value_name: str) -> None:
    if value % divisor:
        raise ConfigError(f"{value_name} = {value} is not divisible by {divisor_name} = {divisor}")
