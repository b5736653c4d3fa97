"""Train a lossless SentencePiece BPE on a corpus and measure how many bytes of each kind of text a token holds.

Example:
    python tools/train_tokenizer.py --input corpus.jsonl src/ --output data/tokenizer --vocab-size 8192
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from steel_megatron.data.sentencepiece_training import train_sentencepiece
from steel_megatron.data.sources import CODE_SUFFIXES, BadRowPolicy, Document, expand_inputs, read_documents
from steel_megatron.data.tokenizer import SentencePieceTokenizer
from steel_megatron.log import exit_code, progress

ZH_SHARE = 0.2
"""A text with at least this share of Chinese characters counts as Chinese."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders or patterns: .jsonl, .jsonl.gz, .txt, code"
    )
    parser.add_argument("--output", required=True, help="path of the model without its suffix .model")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--json-key", default="text", help="key of the text in JSON rows")
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with their own token"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=32_000_000, help="train on a random sample of lines above this"
    )
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="at a row that is no text")
    return parser.parse_args()


def documents(paths: list[Path], json_key: str, on_bad_row: BadRowPolicy, title: str) -> Iterator[Document]:
    with progress(title, sum(path.stat().st_size for path in paths), "bytes") as bar:
        for path in paths:
            yield from read_documents(path, json_key, on_bad_row, on_bytes=bar.advance)


def kind_of(document: Document) -> str:
    """``code`` by the file's suffix; ``zh`` or ``latin`` by the share of Chinese characters."""
    if document.source.endswith(CODE_SUFFIXES):
        return "code"
    chinese = sum("\u3400" <= character <= "\u9fff" for character in document.text)
    return "zh" if chinese >= ZH_SHARE * len(document.text) else "latin"


def main() -> None:
    arguments = parse_arguments()
    paths = expand_inputs(arguments.input)
    texts = documents(paths, arguments.json_key, arguments.on_bad_row, "read")
    model = train_sentencepiece(
        (document.text for document in texts),
        arguments.output,
        arguments.vocab_size,
        character_coverage=arguments.character_coverage,
        max_bytes=arguments.max_bytes,
    )
    tokenizer = SentencePieceTokenizer(model)
    totals: dict[str, list[int]] = {}
    for document in documents(paths, arguments.json_key, arguments.on_bad_row, "measure"):
        total = totals.setdefault(kind_of(document), [0, 0, 0])
        for index, amount in enumerate((1, len(document.text.encode()), len(tokenizer.encode(document.text)))):
            total[index] += amount
    print(f"{model}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:16]}")
    print(f"{'kind':6} {'documents':>10} {'bytes':>14} {'tokens':>14} {'bytes/token':>12}")
    for kind, (count, size, tokens) in sorted(totals.items()):
        print(f"{kind:6} {count:>10,} {size:>14,} {tokens:>14,} {size / tokens:>12.3f}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
