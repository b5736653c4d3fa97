"""The parameters of a function, or the fields of a config, as options of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


def settings_of(target: Callable[..., Any]) -> dict[str, Option]:
    """The options by their dotted names: sections of a config are replaced by their own fields, old names included.

    Args:
        target: a function, or a config.
    """
    found: dict[str, Option] = {}
    for option in options_of(target):
        if is_section(option.kind):
            found |= {f"{option.name}.{name}": inner for name, inner in settings_of(option.kind).items()}
        else:
            found[option.name] = option
    hints = get_type_hints(target)
    old = [name for name, hint in hints.items() if isinstance(hint, dataclasses.InitVar)]
    return found | {name: Option(name, hints[name].type, "", None) for name in old}  # not shown in any help


def is_section(kind: Any) -> bool:
    """Whether an option's type is a config, whose fields are options themselves."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def parts_of(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def list_part(kind: Any) -> Any:
    """The list among the alternatives of a type; None if there is none."""
    return next((part for part in parts_of(kind) if get_origin(part) is list), None)


def entry_of(kind: Any) -> Any:
    """The type of the values of a dictionary among the alternatives of a type; None if there is none."""
    return next((get_args(part)[1] for part in parts_of(kind) if get_origin(part) is dict), None)


def find(settings: Mapping[str, Option], name: str) -> Option | None:
    """An option by its dotted name, or an entry of one that is a dictionary, such as ``data.validation.zh``."""
    if name in settings:
        return settings[name]
    owner, _, entry = name.rpartition(".")
    if not entry or owner not in settings or (kind := entry_of(settings[owner].kind)) is None:
        return None
    return Option(name, kind, settings[owner].help, None)


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
