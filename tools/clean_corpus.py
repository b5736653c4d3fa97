"""Clean corpora by a recipe: operators, deduplication, and a report of dropped documents.

Example:
    python tools/clean_corpus.py examples/steel_1b/clean_text.yaml --output data/clean --workers 8 \\
        --sources skypile='raw/skypile/*.jsonl' wikipedia_cn=raw/wikipedia-cn.json
"""

from __future__ import annotations

import argparse
import sys

from steel_megatron.cli.options import add_flags
from steel_megatron.config import CleanConfig
from steel_megatron.data.cleaning.funnel import table
from steel_megatron.data.cleaning.pipeline import clean_corpus
from steel_megatron.log import exit_code
from steel_megatron.streams import say


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    add_flags(parser, CleanConfig, leave_out=["recipe"])
    return parser.parse_args()


def main() -> None:
    say(table(clean_corpus(CleanConfig(**vars(parse_arguments()))).report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
