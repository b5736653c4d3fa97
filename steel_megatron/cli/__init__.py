"""The command line: ``steel-megatron preprocess | inspect | data append | pretrain | ...``.

Commands are the functions of this package's modules. Their arguments, or the fields of the config that they take, are
the options; docstrings are the help. They import heavy modules locally, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steel_megatron.cli import chat, checkpoints, corpora, evaluation, ledgers, models, slurm
from steel_megatron.cli.help import Command, command_help, completion, group_overview, overview, version
from steel_megatron.cli.options import settings_of
from steel_megatron.cli.suggestions import did_you_mean
from steel_megatron.cli.words import normalized
from steel_megatron.cli.wrong_options import explain, refuse_old_and_new_name
from steel_megatron.config import RunConfig, from_dict, with_homes
from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.log import exit_code

if TYPE_CHECKING:
    import jsonargparse

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
    "checkpoint list": Command(checkpoints.list_checkpoints, ("folder",)),
    "checkpoint verify": Command(checkpoints.verify, ("path",)),
    "checkpoint plan": Command(checkpoints.plan, ("path",), base=checkpoints.base_options),
    "checkpoint reshard": Command(checkpoints.reshard, ("path", "output"), base=checkpoints.base_options),
    "checkpoint compare": Command(checkpoints.compare, ("a", "b")),
    "pretrain": Command(models.pretrain),
    "sft build": Command(chat.sft_build, ("recipe",)),
    "sft prepare": Command(chat.sft_prepare),
    "sft inspect": Command(chat.sft_inspect, ("prefix",)),
    "sft train": Command(chat.sft),
    "dpo prepare": Command(chat.dpo_prepare),
    "dpo train": Command(chat.dpo),
    "export-hf": Command(models.export_hf),
    "import-hf": Command(models.import_hf),
    "generate": Command(models.generate),
    "audit": Command(models.audit, ("path",)),
    "evaluate": Command(evaluation.evaluate, ("model",)),
    "contamination": Command(evaluation.contamination),
    "slurm render": Command(slurm.render),
    "slurm submit": Command(slurm.submit),
    "slurm status": Command(slurm.status, ("run",)),
    "slurm cancel": Command(slurm.cancel, ("run",)),
}
GROUPS = {
    "sft": "Finetune on conversations: build a set, prepare and inspect a corpus, train (sft --options: sft train).",
    "dpo": "Optimize preferences: prepare a corpus of pairs, train (dpo --options: dpo train).",
    "data": "Create, change and show a run's ledger: its corpora, their mixture, the samples of a step.",
    "checkpoint": "List, verify and compare checkpoints, and plan the layout of the run that loads one.",
    "slurm": "Run on a Slurm cluster: print or submit a batch script, show how a run is doing, stop it.",
}
"""The first words of two-word commands, with their help."""
TRAIN = "train"
"""The second word that may be left out."""


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
        words = list(sys.argv[1:] if arguments is None else arguments)
        if (text := _text_asked_for(words)) is not None:
            sys.stdout.write(text)
            return
        name, options = _parse(words)
        options = _with_base(name, options, words)
        called = COMMANDS[name]
        if called.config is not None:
            code = called.function(from_dict(called.config, options, f"the options of {name}"))
        else:
            code = called.function(**with_homes(options))

    return exit_code(command) or code or 0


def _text_asked_for(words: Sequence[str]) -> str | None:
    """Help, the version or a completion script; None if a command is to be run."""
    if not words or words[0] in ("--help", "-h", "--help=all", "help"):
        return overview(COMMANDS, GROUPS)
    if words[0] in ("--version", "-V"):
        return version()
    if words[0].partition("=")[0] == "--completion":
        return completion(COMMANDS, GROUPS, words[0].partition("=")[2] or "".join(words[1:2]))
    own = words[: words.index("--")] if "--" in words else words
    asked = next((word for word in own if word in ("-h", "--help") or word.startswith("--help=")), None)
    if words[0] in GROUPS and (len(words) == 1 or (asked and len(words) == 2)):
        return group_overview(COMMANDS, words[0], GROUPS[words[0]])
    if asked is None:
        return None
    name, _ = _command_of(words)
    return command_help(name, COMMANDS[name], asked.partition("=")[2])


def _command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command that words begin with, and the words after it."""
    if len(words) > 1 and words[1].startswith("--") and f"{words[0]} {TRAIN}" in COMMANDS:
        return f"{words[0]} {TRAIN}", list(words[1:])
    size = 2 if words[0] in GROUPS and len(words) > 1 else 1
    name = " ".join(words[:size])
    if name not in COMMANDS:
        what = f"{words[0]} stands before a command" if words[0].startswith("-") else f"there is no command {name}"
        raise ConfigError(f"{what}{did_you_mean(name, COMMANDS)} (steel-megatron --help lists the commands)")
    return name, list(words[size:])


def _with_base(name: str, options: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a command, on top of those that it begins from where no file is given."""
    base = COMMANDS[name].base
    if base is None or any(word.partition("=")[0] == "--config" for word in arguments):
        return options
    words, path = len(name.split()), Path(options["path"])
    text = json.dumps(base(path))
    try:
        return _parse([*arguments[:words], "--config", text, *arguments[words:]])[1]
    except ConfigError as error:
        raise ConfigError(str(error).replace(text, str(path / "run.yaml"))) from None


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its options."""
    name, words = _command_of(list(arguments))
    command = COMMANDS[name]
    settings = settings_of(command.config or command.function)
    try:
        normal = normalized(words, settings, command.positional)
        options = _parser(name, command).parse_args(normal).as_dict()
    except SteelError as error:
        raise ConfigError(f"{error} (steel-megatron {name} --help lists the options)") from None
    except (ArgumentError, ValueError, RecursionError) as error:
        message = explain(" ".join(str(error).split()), settings)
        raise ConfigError(f"{message} (steel-megatron {name} --help lists the options)") from None
    options.pop("config", None)
    if issubclass(command.config or object, RunConfig):
        refuse_old_and_new_name(options, arguments)
    return name, options


def _parser(name: str, command: Command) -> jsonargparse.ArgumentParser:
    """The parser of a command's options, each as ``--name=value``."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"steel-megatron {name}", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", action="config")
    if command.config is not None:
        parser.add_class_arguments(command.config, None)
    else:
        parser.add_function_arguments(command.function, None, as_positional=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
