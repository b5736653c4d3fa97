"""The parameters of a function, or the fields of a config, as options of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

REQUIRED = inspect.Parameter.empty
"""The default of an option that has to be given."""


@dataclass(frozen=True)
class Option:
    """What a command line has to know of a parameter or a field."""

    name: str
    kind: Any
    help: str
    default: Any


def options_of(target: Callable[..., Any]) -> list[Option]:
    """The options that a function has by its parameters and docstring, or a dataclass by its fields and theirs."""
    hints = get_type_hints(target)
    if not (isinstance(target, type) and dataclasses.is_dataclass(target)):
        defaults = {name: given.default for name, given in inspect.signature(target).parameters.items()}
        documented = docstring_parser.parse(target.__doc__ or "").params
    else:
        defaults = {field.name: _default(field) for field in dataclasses.fields(target)}
        kinds = [kind for kind in reversed(target.__mro__) if dataclasses.is_dataclass(kind)]
        documented = [entry for kind in kinds for entry in docstring_parser.parse_from_object(kind).params]
    help_of = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented}
    return [Option(name, hints[name], help_of.get(name, ""), default) for name, default in defaults.items()]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def add_flags(parser: argparse.ArgumentParser, config: type, leave_out: Collection[str] = ()) -> None:
    """Give a parser a flag ``--like-this`` for each field of a config; what is not given is not in the result.

    Args:
        parser: of a script.
        config: the dataclass.
        leave_out: names of fields that get none.
    """
    for option in options_of(config):
        if option.name not in leave_out:
            required = option.default is REQUIRED
            shown = "" if required or option.default in (None, []) else f" (default: {option.default})"
            parser.add_argument(
                f"--{option.name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                required=required,
                help=(option.help + shown).replace("%", "%%"),
                **_reading(option.kind),
            )


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads values of a type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"nargs": "+", "action": "extend", "type": get_args(kind)[0]}
    return {"type": next((part for part in get_args(kind) if part is not type(None)), kind)}
