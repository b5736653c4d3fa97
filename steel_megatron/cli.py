"""The command line: ``steel-megatron preprocess | pretrain | export-hf | import-hf | generate | audit``.

The functions below are the commands: their arguments are the options, their docstrings the help. Heavy modules
are imported inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_type_hints

import docstring_parser
import jsonargparse

from steel_megatron.config import RunConfig, TokenizerKind, from_dict
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.log import exit_code

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer_path: str,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_keys: list[str] = ["text"],  # noqa: B006 (read by the parser, never changed)
    workers: int = 1,
    append_eod: bool = True,
    valid_fraction: float = 0.0,
    on_bad_row: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    report: str | None = None,
) -> None:
    """Tokenize documents into an indexed corpus (.bin, .idx, .json).

    Args:
        inputs: files, folders or patterns: .jsonl, .jsonl.gz, .txt and source code.
        output_prefix: where the corpus goes; files are named PREFIX_KEY_document.bin and so on.
        tokenizer_path: the tokenizer's folder or file.
        tokenizer_kind: what it is.
        json_keys: which values of a JSON row are documents; one corpus for each.
        workers: processes; the output is the same for any number.
        append_eod: whether each document ends with the end-of-document token.
        valid_fraction: share of documents, chosen by their hash, that goes into a validation corpus.
        on_bad_row: whether a broken row stops the work or is skipped, counted and listed.
        overwrite: whether to replace an earlier corpus of that name.
        report: file for the counts, as JSON.
    """
    import dataclasses
    import json
    import os

    from steel_megatron.data.preprocess import preprocess as run
    from steel_megatron.files import write_atomically

    if report and os.path.isdir(report):
        raise DataError(f"the report {report} is a folder; name a file")
    result = run(
        inputs,
        output_prefix,
        tokenizer_kind,
        tokenizer_path,
        json_keys=tuple(json_keys),
        workers=workers,
        append_eod=append_eod,
        valid_fraction=valid_fraction,
        on_bad_row=on_bad_row,
        overwrite=overwrite,
    )
    if report:
        write_atomically(report, json.dumps(dataclasses.asdict(result), indent=1).encode(), DataError)
    for split, prefix in result.outputs.items():
        sys.stdout.write(
            f"{split}: {result.split_documents[split]:,} documents, {result.split_tokens[split]:,} tokens in {prefix}\n"
        )
    sys.stdout.write(f"unigram entropy: {result.unigram_entropy:.4f} nats per token\n")


def pretrain(run: RunConfig) -> None:
    """Train a model, or go on where its folder stands; alone, under torchrun or under srun."""
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.train.loop import pretrain as train

    train(run)


def export_hf(
    checkpoint: str,
    output: str,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    dtype: Literal["float32", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint into a Hugging Face folder: weights, settings, tokenizer and the model's code.

    Args:
        checkpoint: the checkpoint's folder (step_...).
        output: the folder to make.
        tokenizer_path: the tokenizer's folder or file, to be exported with the model.
        tokenizer_kind: what it is.
        dtype: type of the exported weights; as saved if not given.
        overwrite: whether to replace an earlier folder of that name.
    """
    from pathlib import Path

    from steel_megatron.hf.convert import export_hf as run

    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    run(Path(checkpoint), Path(output), tokenizer, dtype, overwrite=overwrite)


def import_hf(folder: str, output: str, overwrite: bool = False) -> None:
    """Turn a Hugging Face folder into a checkpoint to start from (checkpoint.init_from).

    Args:
        folder: the model's folder, with config.json and safetensors files.
        output: the checkpoint to make.
        overwrite: whether to replace an earlier checkpoint of that name.
    """
    from pathlib import Path

    from steel_megatron.hf.convert import import_hf as run

    run(Path(folder), Path(output), overwrite=overwrite)


def generate(
    model: str,
    prompts: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_output: bool = False,
) -> None:
    """Continue texts with a checkpoint or an exported folder.

    Args:
        model: a checkpoint's folder (step_...) or a Hugging Face folder.
        prompts: the texts to continue.
        max_new_tokens: tokens to add, at most.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn from; 0 for all.
        seed: of the draws.
        tokenizer_path: the tokenizer's folder or file; the model's own if not given.
        tokenizer_kind: what it is.
        json_output: one JSON object per text, with the ids of the new tokens, in place of the text.
    """
    import dataclasses
    import json
    from pathlib import Path

    from steel_megatron.generate import Sampling
    from steel_megatron.generate import generate as run

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    tokenizer = (tokenizer_kind, tokenizer_path) if tokenizer_path else None
    for result in run(Path(model), prompts, sampling, tokenizer):
        line = json.dumps(dataclasses.asdict(result), ensure_ascii=False) if json_output else result.text + "\n"
        sys.stdout.write(line + "\n")


def audit(
    path: str,
    length: int | None = None,
    positions: list[int] = [],  # noqa: B006 (read by the parser, never changed)
    seed: int = 0,
    tolerance: float | None = None,
    layers: int | None = None,
    json: str | None = None,
) -> int:
    """Find out whether a model's tokens see later ones, layer by layer, and whether it decodes what it computes.

    The exit code is 0 if it is causal, 1 if it leaks or computes different things in different ways.

    Args:
        path: a checkpoint's folder (step_...), a Hugging Face folder, or a YAML file with settings.
        length: tokens of the random texts; two blocks and some more if not given.
        positions: tokens to change; if not given, the first, the last, and those inside and at the edges of blocks.
        seed: of texts and replacements, and of the weights where settings are audited.
        tolerance: movement in standard deviations that counts as rounding; 1e-5 if not given.
        layers: audit the first layers only, of a model that does not fit into memory.
        json: file for the figures.
    """
    import os
    from json import dumps
    from pathlib import Path

    from steel_megatron.files import write_atomically
    from steel_megatron.platform import prepare

    if json and os.path.isdir(json):
        raise DataError(f"the report {json} is a folder; name a file")
    prepare()  # before megatron-core is imported
    from steel_megatron.audit import audit as run

    report = run(Path(path), length=length, positions=positions, seed=seed, tolerance=tolerance, layers=layers)
    if json:
        write_atomically(json, (dumps(report.to_dict(), indent=1) + "\n").encode(), DataError)
    sys.stdout.write(report.to_text())
    return 0 if report.passed else 1


COMMANDS: dict[str, Callable[..., int | None]] = {
    "preprocess": preprocess,
    "pretrain": pretrain,
    "export-hf": export_hf,
    "import-hf": import_hf,
    "generate": generate,
    "audit": audit,
}


def _add_options(command: jsonargparse.ArgumentParser, function: Callable[..., object]) -> None:
    """The arguments of ``function`` as options; lists as ``--prompts A B``, where jsonargparse alone has ``[A,B]``.

    An argument called ``path`` is given without its name.
    """
    hints = get_type_hints(function)
    lists: set[str | int] = {name for name, hint in hints.items() if hint in (list[str], list[int])}
    documented = {entry.arg_name: entry.description for entry in docstring_parser.parse(function.__doc__ or "").params}
    for name in sorted(map(str, lists)):
        default = inspect.signature(function).parameters[name].default
        required = default is inspect.Parameter.empty
        extra = {"required": True} if required else {"default": default}
        command.add_argument(f"--{name}", nargs="+", type=get_args(hints[name])[0], help=documented[name], **extra)
    if "path" in hints:
        command.add_argument("path", type=str, metavar="PATH", help=documented["path"])
        lists.add("path")
    command.add_function_arguments(function, None, as_positional=False, skip=lists)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of all commands."""
    parser = jsonargparse.ArgumentParser(
        prog="steel-megatron",
        description="Pretrain Soft-MoE language models: corpus, training, Hugging Face.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").strip().splitlines()[0]
        # A usage line with every option of a run would fill a page before the help begins.
        path = "PATH " if "path" in inspect.signature(function).parameters else ""
        command = jsonargparse.ArgumentParser(
            usage=f"steel-megatron {name} [--config FILE] {path}[--OPTION VALUE ...]",
            description=summary,
            exit_on_error=False,
            allow_abbrev=False,
        )
        command.add_argument("--config", action="config", help="YAML file with options; later ones win.")
        if function is pretrain:
            command.add_class_arguments(RunConfig, None)
        else:
            _add_options(command, function)
        commands.add_subcommand(name, command, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words of the command line; None takes the process's own.

    Returns:
        the exit code: 0, or 1 when a command says so, or 2 when something that the user can mend went wrong.
    """
    said = None

    def command() -> None:
        nonlocal said
        name, options = _parse(sys.argv[1:] if arguments is None else arguments)
        if name == "pretrain":
            pretrain(from_dict(RunConfig, options, "the run's settings"))
        else:
            said = COMMANDS[name](**options)

    return exit_code(command) or said or 0


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    try:
        parsed = build_parser().parse_args(list(arguments))
    except (ArgumentError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())  # jsonargparse writes over several lines
        if "--config" in arguments[:-1]:
            message += f"; settings from {arguments[arguments.index('--config') + 1]}"
        raise ConfigError(f"{message} (steel-megatron COMMAND --help lists the options)") from None
    name = parsed["command"]
    options = parsed[name].as_dict()
    options.pop("config", None)
    return name, options


if __name__ == "__main__":
    sys.exit(main())
