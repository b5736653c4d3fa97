"""The help of the command line, within the width of the terminal, and its completion in shells."""

from __future__ import annotations

import argparse
import platform
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import steel_megatron
from steel_megatron.cli.options import REQUIRED, Option, is_section, list_part, options_of, parts_of, settings_of
from steel_megatron.cli.suggestions import did_you_mean
from steel_megatron.errors import ConfigError

TASKS = {
    "corpora": "Prepare a corpus",
    "ledgers": "Data of a run",
    "checkpoints": "Checkpoints",
    "models": "Train and use a model",
    "chat": "Finetune a model",
    "evaluation": "Evaluate",
    "slurm": "Run on a cluster",
}
"""What the commands of a module are for."""
OFTEN_USED = (
    "model.num_layers", "model.hidden_size", "model.routing_mode", "model.sequence_length",
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "data.train", "data.validation", "data.tokenizer_path",
    "optimizer.lr", "optimizer.warmup_steps",
    "training.train_steps", "training.micro_batch_size", "training.global_batch_size", "training.precision",
    "training.log_interval", "training.eval_interval", "training.seed",
    "checkpoint.directory", "checkpoint.save_interval", "checkpoint.resume_from", "checkpoint.init_from",
)  # fmt: skip
"""The options of a run in its short help."""
_WIDEST = 100


@dataclass(frozen=True)
class Command:
    """A command: its function, and the names of its positional arguments in order.

    ``base`` are the options that it begins from without ``--config``, found by the argument ``path``.
    """

    function: Callable[..., int | None]
    positional: tuple[str, ...] = ()
    base: Callable[[Path], dict[str, Any]] | None = None

    @property
    def config(self) -> type | None:
        """The dataclass whose fields are the options; None where the function's arguments are."""
        kinds = [kind for name, kind in get_type_hints(self.function).items() if name != "return"]
        return next((kind for kind in kinds if is_section(kind)), None)

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def task(self) -> str:
        """What it is for."""
        module = self.function.__module__.rpartition(".")[2]
        return TASKS.get(module, module)


def version() -> str:
    """The version of the library, and of what it stands on."""
    others = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core"))
    return f"steel-megatron {steel_megatron.__version__} ({others}, Python {platform.python_version()})\n"


def overview(commands: Mapping[str, Command], groups: Mapping[str, str]) -> str:
    """The commands by task.

    Args:
        commands: all commands by name.
        groups: the first words of two-word commands, with their help.
    """
    tasks: dict[str, dict[str, str]] = {}
    for name, command in commands.items():
        first = name.split()[0]
        tasks.setdefault(command.task, {})[first] = groups.get(first, command.summary)
    lines = ["usage: steel-megatron COMMAND [--OPTION VALUE ...]", ""]
    lines += _filled("Pretrain Soft-MoE language models: corpus, training, Hugging Face.")
    for task, of_task in tasks.items():
        lines += ["", f"{task}:", *_table(of_task)]
    lines += ["", "steel-megatron COMMAND --help    the options of a command"]
    lines += ["steel-megatron --version         versions", "steel-megatron --completion bash completion for a shell"]
    return "\n".join(lines) + "\n"


def group_overview(commands: Mapping[str, Command], group: str, summary: str) -> str:
    """The commands of a group.

    Args:
        commands: all commands by name.
        group: the first of their two words.
        summary: what they are for.
    """
    own = {name.split()[1]: command.summary for name, command in commands.items() if name.split()[0] == group}
    lines = [f"usage: steel-megatron {group} COMMAND [--OPTION VALUE ...]", "", *_filled(summary), "", *_table(own)]
    return "\n".join(lines) + "\n"


def command_help(name: str, command: Command, part: str) -> str:
    """The help of a command.

    Args:
        name: its name.
        command: the command.
        part: empty for the options that people use, ``all`` for all, or a section such as ``parallel``.

    Raises:
        ConfigError: there is no such section.
    """
    target = command.config or command.function
    settings = {name: option for name, option in settings_of(target).items() if option.help}
    sections = [option.name for option in options_of(target) if is_section(option.kind)]
    if part not in ("", "all", *sections):
        words = ", ".join(f"--help={one}" for one in ("all", *sections))
        raise ConfigError(f"there is no --help={part}{did_you_mean(part, ['all', *sections])} ({words})")
    shown = settings
    if part in sections:
        shown = {name: option for name, option in settings.items() if name.startswith(f"{part}.")}
    elif sections and not part:
        shown = {name: option for name, option in settings.items() if "." not in name or name in OFTEN_USED}
    metavars = [_metavar(settings[one]) for one in command.positional]
    lines = [f"usage: {' '.join(['steel-megatron', name, '[--config FILE]', *metavars, '[--OPTION VALUE ...]'])}", ""]
    lines += _filled(" ".join((command.function.__doc__ or "").split("Args:")[0].split()))
    for one, words in zip(command.positional, metavars, strict=True):
        lines += ["", *_entry(words, settings[one])]
    lines.append("")
    if part not in sections:
        lines += ["--config FILE", "    YAML file of options; later options override it."]
        lines += ["--print_config", "    Print all options with their values as YAML, and end."]
    previous = ""
    for option_name, option in shown.items():
        if option_name in command.positional:
            continue
        section = option_name.rpartition(".")[0]
        lines += [""] if section != previous else []
        previous = section
        lines += _entry(f"--{option_name} {_value(option.kind)}".rstrip(), option)
    if len(shown) < len(settings):
        lines += ["", *_filled(f"{len(settings) - len(shown)} more options: --help=all, or --help=SECTION with one of "
                               f"{', '.join(sections)}.")]  # fmt: skip
    return "\n".join(lines) + "\n"


def _entry(head: str, option: Option) -> list[str]:
    facts = [described_in_words(option.kind)]
    if option.default is REQUIRED:
        facts.append("required")
    elif option.default not in (None, [], {}):
        shown = str(option.default).lower() if isinstance(option.default, bool) else option.default
        facts.append(f"default {' '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    text = f"{option.help} ({'; '.join(facts)})"
    return [head, *_filled(text, "    ")]


def described_in_words(kind: Any) -> str:
    """An option's type for a reader: ``a whole number``, ``one of a, b``, ``one or several texts``."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return {int: "one or several whole numbers", float: "one or several numbers"}.get(
            get_args(kind)[0], "one or several values"
        )
    if get_origin(kind) is dict:
        return "values by name"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join(names[one] if one in names else described_in_words(one) for one in parts_of(kind))


def _value(kind: Any) -> str:
    """What stands for an option's value in its first line."""
    if list_part(kind) is not None:
        return "VALUE ..."
    if bool in parts_of(kind):
        return ""
    return "N" if int in parts_of(kind) else "VALUE"


def _metavar(option: Option) -> str:
    """``PREFIX ...`` for ``prefixes: list[str]``."""
    name = option.name
    if list_part(option.kind) is None:
        return name.upper()
    return f"{name.removesuffix('es' if name.endswith('xes') else 's').upper()} ..."


def _table(rows: Mapping[str, str]) -> list[str]:
    """Names and what they are, in two columns."""
    size = max(map(len, rows)) + 4
    lines = []
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, _width() - size) or [""]
        lines += [f"  {name:<{size - 2}}{first}", *(" " * size + line for line in rest)]
    return lines


def _filled(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return max(40, min(shutil.get_terminal_size().columns, _WIDEST))


def completion(commands: Mapping[str, Command], groups: Mapping[str, str], shell: str) -> str:
    """A script that completes commands and options in a shell.

    Args:
        commands: all commands by name.
        groups: the first words of two-word commands, with their help.
        shell: ``bash``, ``zsh`` or ``tcsh``.

    Raises:
        ConfigError: shtab, which writes it, is not installed, or knows no such shell.
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion needs the package shtab; pip install 'steel-megatron[completion]'") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(f"--completion is {shell!r}; it must be one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser("steel-megatron")
    parser.add_argument("--version", action="store_true", help="versions")
    levels: dict[str, Any] = {"": parser.add_subparsers()}
    for group, summary in groups.items():
        levels[group] = levels[""].add_parser(group, help=summary).add_subparsers()
    for name, command in commands.items():
        group, _, last = name.rpartition(" ")
        own = levels[group].add_parser(last, help=command.summary)
        own.add_argument("--config", help="YAML file of options").complete = shtab.FILE
        for option_name, option in settings_of(command.config or command.function).items():
            if option.help and option_name not in command.positional:
                _add_to_completion(own, f"--{option_name}", option, shtab.FILE)
        for one in command.positional:
            own.add_argument(one, nargs="*").complete = shtab.FILE
    return str(shtab.complete(parser, shell)) + "\n"


def _add_to_completion(parser: argparse.ArgumentParser, name: str, option: Option, files: Any) -> None:
    choices = next((get_args(part) for part in parts_of(option.kind) if get_origin(part) is Literal), None)
    if bool in parts_of(option.kind):
        choices = ("true", "false")
    added = parser.add_argument(name, nargs="*", choices=choices, help=option.help.replace("%", "%%"))
    if choices is None and (str in parts_of(option.kind) or list_part(option.kind) is not None):
        added.complete = files  # type: ignore[attr-defined]
