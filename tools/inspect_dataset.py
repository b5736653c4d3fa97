"""Show what an indexed corpus (.bin and .idx) holds, and check it.

Example:
    python tools/inspect_dataset.py data/corpus_text_document --verify --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model qwen_tokenizer
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from steel_megatron.config import MEGATRON_TOKENIZER_TYPES
from steel_megatron.data.indexed import IndexedCorpus, open_indexed, verify
from steel_megatron.data.tokenizer import Tokenizer, load_tokenizer
from steel_megatron.errors import DataError
from steel_megatron.log import exit_code

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="path of the corpus without .bin or .idx")
    parser.add_argument("--tokenizer-type", choices=sorted(MEGATRON_TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    parser.add_argument(
        "--tokenizer-model", help="folder of a Hugging Face tokenizer, or a .model file; decodes samples"
    )
    parser.add_argument("--samples", type=int, default=3, help="documents to decode, evenly spread")
    parser.add_argument("--verify", action="store_true", help="read everything; check ids and checksums")
    return parser.parse_args()


def show_samples(corpus: IndexedCorpus, tokenizer: Tokenizer, samples: int) -> None:
    recorded = (corpus.manifest or {}).get("tokenizer", {}).get("fingerprint", tokenizer.fingerprint)
    if recorded != tokenizer.fingerprint:
        raise DataError(
            f"{corpus.prefix} was made with another tokenizer: fingerprint {recorded}, this one has "
            f"{tokenizer.fingerprint}"
        )
    shown = np.linspace(0, corpus.documents - 1, max(min(samples, corpus.documents), 0)).astype(int)
    for document in map(int, shown):
        size = int(corpus.sizes[document])
        text = tokenizer.decode(corpus.tokens_of(document, 0, min(size, 200)).tolist())
        print(f"document {document} ({size:,} tokens): {text[:200]!r}")


def main() -> None:
    arguments = parse_arguments()
    tokenizer = None
    if arguments.tokenizer_model:
        tokenizer = load_tokenizer(MEGATRON_TOKENIZER_TYPES[arguments.tokenizer_type], arguments.tokenizer_model)
    vocab_size = tokenizer.vocab_size if tokenizer else None
    corpus = open_indexed(arguments.prefix, vocab_size)
    print(f"{corpus.prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens of {corpus.dtype}")
    quantiles = np.quantile(corpus.sizes, QUANTILES, method="nearest")
    print("tokens per document:", ", ".join(f"{q:.0%} {int(n):,}" for q, n in zip(QUANTILES, quantiles, strict=True)))
    if tokenizer:
        show_samples(corpus, tokenizer, arguments.samples)
    if arguments.verify:
        result = verify(arguments.prefix, vocab_size)
        checksums = "checksums match" if result.checksums else "no manifest, so no checksums to compare"
        print(f"verified: structure in order, largest id {result.max_id}, {checksums}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
