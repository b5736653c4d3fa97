"""JSON objects as frozen dataclasses, read strictly: whatever is missing, unknown or wrong is named.

The type hint of a field says what its JSON may be: a dataclass (or None), a tuple of dataclasses, a plain type, or
``Annotated[type, Rule(...)]`` where the type alone does not say it. The field's metadata may hold

- ``key``: the name in the JSON, if it differs from the field's;
- ``required``: whether it must be in the JSON although the field has a default.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from steel_megatron.config.loading import described, is_a
from steel_megatron.errors import DataError

REQUIRED = {"required": True}
MOST = 2**62
"""The largest whole number in a record: it fits an int64 with room to add."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Rule:
    """What a value must be."""

    holds: Callable[[Any], bool]
    right: str
    """The same in words, for messages."""

    def check(self, value: object, what: str) -> None:
        """Raise a DataError unless a value is right; ``what`` names it."""
        if not self.holds(value):
            raise DataError(f"{what} is {shown(value)}; it must be {self.right}")


def whole(least: int = 0, most: int = MOST) -> Rule:
    """Whole numbers of a range; true and false are none."""
    return Rule(lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")


def or_null(rule: Rule) -> Rule:
    """A rule that allows null as well."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.right}, or null")


def list_of(rule: Rule, right: str) -> Rule:
    """Lists whose entries all follow a rule; ``right`` says it in words."""
    return Rule(lambda value: isinstance(value, list) and all(map(rule.holds, value)), right)


SHA256 = Rule(lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)), "64 hex digits")


def shown(value: object) -> str:
    """The beginning of a value, for a message."""
    return repr(value)[:80]


def from_json(kind: type[Record], value: object, where: str, *, strict: bool = True) -> Record:
    """Build a dataclass from a JSON object.

    Args:
        kind: the dataclass; a DataError that it raises itself gets the place in front.
        value: what the JSON holds.
        where: file and place in it, for messages.
        strict: whether to refuse unknown fields; otherwise they are ignored.

    Raises:
        DataError: a field is missing, unknown or wrong; the message names it.
    """
    hints, fields = _fields(kind)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise DataError(f"{where} is {shown(value)}; it must be an object with {', '.join(fields)}")
    unknown = sorted(set(value) - set(fields)) if strict else []
    if unknown:
        raise DataError(f"{where} has an unknown field {unknown[0]!r}; it may have {', '.join(fields)}")
    built = {}
    for key, field in fields.items():
        hint = hints[field.name]
        if key in value:
            built[field.name] = _checked(value[key], hint, where, key)
        elif field.metadata.get("required") or _default(field) is dataclasses.MISSING:
            raise DataError(f"{where} has no field {key!r}; it must be {_rule(hint).right}")
    try:
        return kind(**built)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as a JSON object. What equals its default is left out unless it is required."""
    values = {}
    for key, field in _fields(type(record))[1].items():  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if field.metadata.get("required") or value != _default(field):
            values[key] = _plain(value)
    return values


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """Type hints by field, and fields by their name in the JSON."""
    fields = {field.metadata.get("key", field.name): field for field in dataclasses.fields(kind)}
    return get_type_hints(kind, include_extras=True), fields


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _checked(value: Any, hint: Any, where: str, key: str) -> Any:
    """A field's value; lists become tuples."""
    kind, parts = get_origin(hint), get_args(hint)
    _rule(hint).check(value, f"{where}: {key}")
    record: Any = next(filter(dataclasses.is_dataclass, (hint, *parts)), None)
    if value is None or record is None or kind is Annotated:
        return tuple(value) if isinstance(value, list) else value
    if kind is tuple:
        return tuple(from_json(record, entry, f"{where}, {key}[{number}]") for number, entry in enumerate(value))
    return from_json(record, value, f"{where}, {key}")


def _rule(hint: Any) -> Rule:
    """What a field must be, but for the fields of a dataclass in it."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return parts[1]
    if kind is tuple and dataclasses.is_dataclass(parts[0]):
        return Rule(lambda value: isinstance(value, list), "a list")
    if dataclasses.is_dataclass(hint) or any(map(dataclasses.is_dataclass, parts)):
        is_object = Rule(lambda value: isinstance(value, dict), "an object")
        return or_null(is_object) if type(None) in parts else is_object
    return Rule(lambda value: is_a(value, hint), described(hint))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return dict(value) if isinstance(value, Mapping) else value
