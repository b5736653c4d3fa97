"""Tokenize a corpus into Megatron's .bin and .idx files, with the flags of Megatron's script of that name.

After a kill, repeat the same command to resume.

Example:
    python tools/preprocess_data.py --input 'corpus/*.jsonl' --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model qwen_tokenizer --append-eod --workers 8
    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 8 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from steel_megatron.cli.options import add_flags
from steel_megatron.config import MEGATRON_TOKENIZER_TYPES, PreprocessConfig, TokenizerKind
from steel_megatron.data.preprocessing.pipeline import PreprocessReport, preprocess
from steel_megatron.data.tokenizing.huggingface import GPT2_EOD, save_gpt2
from steel_megatron.errors import ConfigError
from steel_megatron.log import exit_code, get_logger
from steel_megatron.streams import say

GPT2 = "GPT2BPETokenizer"
KINDS: dict[str, TokenizerKind] = {**MEGATRON_TOKENIZER_TYPES, GPT2: "huggingface"}
"""Tokenizer kind for each ``--tokenizer-type``."""

OF_MEGATRON = ("inputs", "output_prefix", "tokenizer_path", "tokenizer_kind", "append_eod")
"""Settings that have a flag of Megatron's, of another name, sense or default."""

NOT_NEEDED = {
    "partitions": "inputs are always split into chunks for all --workers, in order",
    "log_interval": "progress is logged at time intervals",
    "keep_sequential_samples": "documents always keep their input order",
    "lang": "only used with --split-sentences",
    "keep_newlines": "only used with --split-sentences",
    "dataset_impl": "the only format is Megatron's mmap",
    "vocab_size": "the tokenizer defines the size",
    "make_vocab_size_divisible_by": "ids come from the tokenizer; the model pads its own vocabulary",
}
"""Megatron flags that have no effect here, and why."""

REFUSED = {
    "split_sentences": "sentence splitting is not supported; only BERT and T5 need it. Leave it out for GPT",
    "find_optimal_num_workers": "set --workers to the number of free cores and leave it out",
}
"""Unsupported Megatron flags, and what to do instead."""

_log = get_logger("steel_megatron.tools.preprocess_data")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        help="files, folders or patterns, each alone or as SOURCE=PATTERN",
    )
    parser.add_argument("--output-prefix", required=True, help="begin of the output paths; _<key>_document is appended")
    parser.add_argument("--tokenizer-type", choices=sorted(KINDS), required=True)
    parser.add_argument("--tokenizer-model", help="folder or tokenizer.json of Hugging Face's, or a .model file")
    parser.add_argument("--vocab-file", help=f"of {GPT2}: vocab.json")
    parser.add_argument("--merge-file", help=f"of {GPT2}: merges.txt")
    parser.add_argument("--append-eod", action="store_true", help="end each document in the end-of-document token")
    add_flags(parser, PreprocessConfig, leave_out=OF_MEGATRON)
    _add_flags_without_use(parser)
    return parser.parse_args()


def _add_flags_without_use(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Megatron flags without effect, or refused")
    switches = ("keep_sequential_samples", "keep_newlines", *REFUSED)
    for name, why in {**NOT_NEEDED, **REFUSED}.items():
        flag = f"--{name.replace('_', '-')}"
        if name in switches:
            group.add_argument(flag, action="store_true", help=why)
        else:
            group.add_argument(flag, help=why)


def check_flags(arguments: argparse.Namespace) -> None:
    """Log flags without effect.

    Raises:
        ConfigError: a flag is unsupported, or the tokenizer's files do not belong to its type.
    """
    for name, why in REFUSED.items():
        if getattr(arguments, name):
            raise ConfigError(f"--{name.replace('_', '-')}: {why}")
    for name, why in NOT_NEEDED.items():
        if getattr(arguments, name):
            _log.info(f"--{name.replace('_', '-')} is not needed: {why}")
    kind = arguments.tokenizer_type
    needed = ("vocab_file", "merge_file") if kind == GPT2 else ("tokenizer_model",)
    for name in ("vocab_file", "merge_file", "tokenizer_model"):
        flag, given = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if name in needed and not given:
            raise ConfigError(f"{flag} is missing; --tokenizer-type {kind} needs it")
        if given and name not in needed:
            raise ConfigError(f"{flag} {given} does not belong to --tokenizer-type {kind}; change one of the two")


def run(arguments: argparse.Namespace) -> PreprocessReport:
    """Preprocess as the flags say."""
    with tempfile.TemporaryDirectory() as folder:
        path, fields = arguments.tokenizer_model, {field.name for field in dataclasses.fields(PreprocessConfig)}
        alike = {name: value for name, value in vars(arguments).items() if name in fields}
        if arguments.tokenizer_type == GPT2:
            path, eod_token = folder, alike.get("eod_token") or GPT2_EOD
            save_gpt2(Path(arguments.vocab_file), Path(arguments.merge_file), Path(folder), eod_token)
        kind = KINDS[arguments.tokenizer_type]
        return preprocess(PreprocessConfig(inputs=arguments.input, tokenizer_path=path, tokenizer_kind=kind, **alike))


def main() -> None:
    arguments = parse_arguments()
    check_flags(arguments)
    say(run(arguments).summary())


if __name__ == "__main__":
    sys.exit(exit_code(main))
