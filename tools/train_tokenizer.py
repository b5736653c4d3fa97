"""Train a lossless SentencePiece BPE and measure its bytes per token on each kind of text.

Example:
    python tools/train_tokenizer.py --input 'skypile=sky/*.jsonl.zst' src/ --valid held_out.jsonl \\
        --output data/tokenizer --vocab-size 8192 --report data/tokenizer.json
"""

from __future__ import annotations

import argparse
import json
import sys

from steel_megatron.data.tokenizing.tokenizer import DIALOGUE_MARKS
from steel_megatron.data.tokenizing.training import train_tokenizer
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically
from steel_megatron.log import exit_code
from steel_megatron.streams import say


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        help="files, folders or patterns, optionally as SOURCE=PATTERN",
    )
    parser.add_argument("--output", required=True, help="output path without the suffix .model")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument(
        "--valid", nargs="+", action="extend", default=[], help="held-out text to measure on; default: --input"
    )
    parser.add_argument("--json-key", default="text", help="JSON key of the text")
    parser.add_argument(
        "--control-tokens",
        nargs="*",
        action="extend",
        help=f"in addition to <unk>, <s> and </s>; default: {' '.join(DIALOGUE_MARKS)}",
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="fraction of characters that get their own token"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=32_000_000, help="above this, train on a random sample of lines"
    )
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="at a row without valid text")
    parser.add_argument("--seed", type=int, default=0, help="random seed of that sample")
    parser.add_argument("--report", help="file for the figures, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    trained = train_tokenizer(
        arguments.input,
        arguments.output,
        arguments.vocab_size,
        valid=arguments.valid,
        text_key=arguments.json_key,
        control_tokens=DIALOGUE_MARKS if arguments.control_tokens is None else arguments.control_tokens,
        character_coverage=arguments.character_coverage,
        max_bytes=arguments.max_bytes,
        on_bad_row=arguments.on_bad_row,
        seed=arguments.seed,
    )
    if arguments.report:
        content = json.dumps(trained.as_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(arguments.report, content.encode(), DataError)
    tokenizer = trained.tokenizer
    say(f"{trained.model}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:16]}")
    where = "held-out text" if trained.held_out else "the training text"
    say(f"measured on {where}; {trained.skipped:,} rows skipped")
    say(f"{'kind':6} {'documents':>10} {'bytes':>14} {'tokens':>14} {'bytes/token':>12}")
    for kind, found in trained.kinds.items():
        say(f"{kind:6} {found.documents:>10,} {found.bytes:>14,} {found.tokens:>14,} {found.bytes_per_token:>12.3f}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
