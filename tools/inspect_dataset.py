"""Show the content of indexed corpora (.bin and .idx), and verify them.

Example:
    python tools/inspect_dataset.py data/corpus_text_document --verify --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model qwen_tokenizer
"""

from __future__ import annotations

import argparse
import sys

from steel_megatron.config import MEGATRON_TOKENIZER_TYPES
from steel_megatron.data.indexed.inspection import inspect_corpus, verify_corpus
from steel_megatron.log import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="corpus path without .bin or .idx, or a pattern")
    parser.add_argument("--tokenizer-type", choices=sorted(MEGATRON_TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", help="Hugging Face tokenizer folder or .model file, to decode samples")
    parser.add_argument("--samples", type=int, default=3, help="number of documents to show, evenly spaced")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read everything and check ids and checksums")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    kind = MEGATRON_TOKENIZER_TYPES[arguments.tokenizer_type]
    inspect_corpus(arguments.prefix, arguments.tokenizer_model, kind, arguments.samples, arguments.json)
    if arguments.verify:
        verify_corpus(arguments.prefix)


if __name__ == "__main__":
    sys.exit(exit_code(main))
