"""Tokenize a corpus into Megatron's .bin and .idx files, with the flags of Megatron's script of this name.

Given again after a kill, the same command goes on where it was.

Example:
    python tools/preprocess_data.py --input 'corpus/*.jsonl' --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model qwen_tokenizer --append-eod --workers 8
"""

from __future__ import annotations

import argparse
import sys

from steel_megatron.config import MEGATRON_TOKENIZER_TYPES
from steel_megatron.data.preprocess import preprocess
from steel_megatron.log import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders or patterns, each alone or as SOURCE=PATTERN"
    )
    parser.add_argument("--output-prefix", required=True, help="begin of the output paths; _<key>_document is appended")
    parser.add_argument("--tokenizer-type", choices=sorted(MEGATRON_TOKENIZER_TYPES), required=True)
    parser.add_argument("--tokenizer-model", required=True, help="folder of a Hugging Face tokenizer, or a .model file")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the rows to make corpora of")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--append-eod", action="store_true", help="end each document in the end-of-document token")
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="share of the documents for validation")
    parser.add_argument("--shard-size", type=int, help="most tokens of a corpus; what follows goes into the next")
    parser.add_argument("--engine", choices=("auto", "gigatoken", "tokenizers"), default="auto", help="what encodes")
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="at a row that is no text")
    parser.add_argument("--overwrite", action="store_true", help="replace corpora that are there, or begin anew")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the validation split")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = preprocess(
        inputs=arguments.input,
        output_prefix=arguments.output_prefix,
        tokenizer_kind=MEGATRON_TOKENIZER_TYPES[arguments.tokenizer_type],
        tokenizer_path=arguments.tokenizer_model,
        json_keys=arguments.json_keys,
        workers=arguments.workers,
        append_eod=arguments.append_eod,
        valid_fraction=arguments.valid_fraction,
        on_bad_row=arguments.on_bad_row,
        overwrite=arguments.overwrite,
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        engine=arguments.engine,
    )
    for name, prefix in report.outputs.items():
        print(f"{name}: {prefix}  {report.split_documents[name]:,} documents, {report.split_tokens[name]:,} tokens")
    print(f"documents: {report.documents:,} written + {report.skipped:,} skipped")
    print(f"unigram entropy: {report.unigram_entropy:.4f} nats per token")


if __name__ == "__main__":
    sys.exit(exit_code(main))
