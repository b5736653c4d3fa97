"""Clean corpora by a recipe: operators, deduplication, and a report of dropped documents.

Example:
    python tools/clean_corpus.py examples/steel_1b/clean_text.yaml --output data/clean --workers 8 \\
        --sources skypile='raw/skypile/*.jsonl' wikipedia_cn=raw/wikipedia-cn.json
"""

from __future__ import annotations

import argparse
import sys

from steel_megatron.data.cleaning.funnel import table
from steel_megatron.data.cleaning.pipeline import clean_corpus
from steel_megatron.log import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument(
        "--sources", nargs="+", action="extend", help="files, folders or patterns, each alone or as SOURCE=PATTERN"
    )
    parser.add_argument("--output", help="folder of the result")
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer, or a .model file")
    parser.add_argument("--text-key", default="text", help="key of the text, for inputs without a source's name")
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="at a row that is no text")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="where the tasks run")
    parser.add_argument("--workers", type=int, default=1, help="tasks that run at the same time")
    parser.add_argument("--tasks", type=int, help="tasks of a stage; one for each piece of the input if not given")
    parser.add_argument("--slurm-partition", help="partition of the Slurm jobs")
    parser.add_argument("--slurm-time", default="24:00:00", help="time limit of a Slurm task")
    parser.add_argument("--slurm-memory-gb", type=int, default=4, help="memory of a Slurm task")
    parser.add_argument("--slurm-qos", help="quality of service of the Slurm jobs")
    parser.add_argument("--slurm-setup", help="shell command that sets this environment up on a node")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return parser.parse_args()


def main() -> None:
    print(table(clean_corpus(**vars(parse_arguments())).report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
