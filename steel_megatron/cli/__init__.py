"""The command line: ``steel-megatron preprocess | inspect | data append | pretrain | ...``.

Commands are the functions of this package's modules. Their arguments, or the fields of the config that they take, are
the options; docstrings are the help. They import heavy modules locally, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml

from steel_megatron.cli import corpora, ledgers, models
from steel_megatron.cli.options import REQUIRED, Option, options_of
from steel_megatron.cli.wrong_options import explain, refuse_old_and_new_name
from steel_megatron.config import RunConfig, from_dict, refuse_repeated_keys
from steel_megatron.errors import ConfigError
from steel_megatron.log import exit_code

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
_load_value = jsonargparse.get_loader("yaml")


def _load_once(text: str) -> Any:
    """What the parser reads YAML with, of files and of values, but for keys that are there twice."""
    refuse_repeated_keys(text)
    return _load_value(text)


jsonargparse.set_loader("yaml", _load_once, (yaml.YAMLError,))


@dataclass(frozen=True)
class Command:
    """A command: its function, and the names of its positional arguments in order."""

    function: Callable[..., int | None]
    positional: tuple[str, ...] = ()

    @property
    def config(self) -> type | None:
        """The dataclass whose fields are the options; None where the function's arguments are."""
        kinds = [kind for name, kind in get_type_hints(self.function).items() if name != "return"]
        return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)

    def options(self) -> list[Option]:
        """What the command line has, in its order."""
        return options_of(self.config or self.function)


COMMANDS = {
    "sources": Command(corpora.sources),
    "clean": Command(corpora.clean, ("recipe",)),
    "preprocess": Command(corpora.preprocess),
    "inspect": Command(corpora.inspect_corpora, ("prefixes",)),
    "verify": Command(corpora.verify_corpora, ("prefixes",)),
    "merge": Command(corpora.merge_corpora, ("prefixes",)),
    "data create": Command(ledgers.create, ("ledger", "prefixes")),
    "data append": Command(ledgers.append, ("ledger", "prefixes")),
    "data remove": Command(ledgers.remove, ("ledger", "names")),
    "data reweight": Command(ledgers.reweight, ("ledger", "names")),
    "data mixture": Command(ledgers.mixture, ("ledger", "weights")),
    "data cancel": Command(ledgers.cancel, ("ledger",)),
    "data relocate": Command(ledgers.relocate, ("ledger", "old", "new")),
    "data skip": Command(ledgers.skip, ("ledger",)),
    "data show": Command(ledgers.show, ("ledger",)),
    "pretrain": Command(models.pretrain),
    "export-hf": Command(models.export_hf),
    "import-hf": Command(models.import_hf),
    "generate": Command(models.generate),
    "audit": Command(models.audit, ("path",)),
}
GROUPS = {"data": "Create, change and show a run's ledger: its corpora, their mixture, the samples of a step."}
"""The first words of two-word commands, with their help."""


class _ListOption(Action):
    """``--inputs A --inputs B`` means ``--inputs A B``; a value from a default or a file is replaced, not extended."""

    _given: list[Any] | None = None

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        self._given = [*before, *values] if self._given is not None and before is self._given else list(values)
        setattr(namespace, self.dest, self._given)

    def _check_type(self) -> None:
        """Its presence makes jsonargparse check values, also those from a file, with the method below."""

    def _check_type_(self, value: object, **_: object) -> object:
        if not isinstance(value, list):
            raise TypeError(f'Parser key "{self.dest}": {value!r} is not a list; write [{value}]')
        assert callable(self.type)
        try:
            return [self.type(entry) for entry in value]
        except ValueError as error:
            raise TypeError(f'Parser key "{self.dest}": {error}') from error


def _add_options(parser: jsonargparse.ArgumentParser, command: Command) -> None:
    """The options of a command; lists as ``--prompts A B``, where jsonargparse alone has ``[A,B]``."""
    options = {option.name: option for option in command.options()}
    lists = [name for name, option in options.items() if option.kind in (list[str], list[int])]
    for name in sorted(set(lists) - set(command.positional)):
        option = options[name]
        extra = {"required": True} if option.default is REQUIRED else {"default": option.default}
        kind = get_args(option.kind)[0]
        parser.add_argument(f"--{name}", nargs="+", type=kind, action=_ListOption, help=option.help, **extra)
    for name in command.positional:
        several: dict[str, Any] = {"nargs": "+"} if name in lists else {}
        parser.add_argument(name, type=str, metavar=_metavar(options[name]), help=options[name].help, **several)
    skip: set[str | int] = {*lists, *command.positional}
    if command.config is not None:
        parser.add_class_arguments(command.config, None, skip=skip)
    else:
        parser.add_function_arguments(command.function, None, as_positional=False, skip=skip)


def _metavar(option: Option) -> str:
    """``PREFIX`` for ``prefixes: list[str]``, of which the usage line says ``PREFIX ...``."""
    name = option.name
    if option.kind == list[str]:
        name = name.removesuffix("es") if name.endswith("xes") else name.removesuffix("s")
    return name.upper()


def _command_parser(name: str, command: Command) -> jsonargparse.ArgumentParser:
    # A usage line with every option of a run would fill a page.
    options = {option.name: option for option in command.options()}
    positional = [options[word] for word in command.positional]
    shown = [_metavar(option) + (" ..." if option.kind == list[str] else "") for option in positional]
    parser = jsonargparse.ArgumentParser(
        usage=" ".join(["steel-megatron", name, "[--config FILE]", *shown, "[--OPTION VALUE ...]"]),
        description=_summary(command),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it.")
    _add_options(parser, command)
    return parser


def _summary(command: Command) -> str:
    return (command.function.__doc__ or "").strip().splitlines()[0]


def build_parser() -> jsonargparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = jsonargparse.ArgumentParser(
        prog="steel-megatron",
        description="Pretrain Soft-MoE language models: corpus, training, Hugging Face.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    levels: dict[str, Any] = {"": commands}
    for group, summary in GROUPS.items():
        of_group = jsonargparse.ArgumentParser(
            prog=f"steel-megatron {group}", description=summary, exit_on_error=False, allow_abbrev=False
        )
        commands.add_subcommand(group, of_group, help=summary)  # must precede its own subcommands
        levels[group] = of_group.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        levels[group].add_subcommand(last, _command_parser(name, command), help=_summary(command))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: command-line arguments; None for ``sys.argv``.

    Returns:
        the exit code, see :class:`ExitCode`.
    """
    code = None

    def command() -> None:
        nonlocal code
        name, options = _parse(sys.argv[1:] if arguments is None else arguments)
        called = COMMANDS[name]
        if called.config is not None:
            code = called.function(from_dict(called.config, options, f"the options of {name}"))
        else:
            code = called.function(**options)

    return exit_code(command) or code or 0


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its options."""
    try:
        parsed = build_parser().parse_args(list(arguments))
    except (ArgumentError, ValueError, RecursionError) as error:
        words = " ".join(arguments[: 2 if set(arguments[:1]) & set(GROUPS) else 1])
        kinds = {option.name: option.kind for option in COMMANDS[words].options()} if words in COMMANDS else {}
        message = explain(_one_line(error), arguments, kinds, _failure)
        name = words if words in COMMANDS else "COMMAND"
        raise ConfigError(f"{message} (steel-megatron {name} --help lists the options)") from None
    name = parsed["command"]
    chosen = parsed[name]
    if name in GROUPS:
        name, chosen = f"{name} {chosen['command']}", chosen[chosen["command"]]
    options = chosen.as_dict()
    options.pop("config", None)
    if COMMANDS[name].config is RunConfig:
        refuse_old_and_new_name(options, arguments)
    return name, options


def _failure(arguments: list[str]) -> str | None:
    try:
        build_parser().parse_args(arguments)
    except (ArgumentError, ValueError, RecursionError) as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    """jsonargparse's messages span several lines."""
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
