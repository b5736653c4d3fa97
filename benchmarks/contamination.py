"""Speed of the search for benchmarks in a corpus, in MB of text per second, beside decoding alone.

    python benchmarks/contamination.py [--megabytes 20]

Half of the fixtures' texts stand for a benchmark's items, the corpus is drawn from the other half. One document of 50
holds an item, and those must be found.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.evaluation.contamination import Item, find_overlaps
from tests.data.configured import preprocess
from tests.fixtures.make_tokenizer import make_tokenizer
from tests.fixtures.texts import CORPUS, corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    megabytes = parser.parse_args().megabytes
    every = [text for path in sorted(CORPUS.glob("*.jsonl")) for text in corpus(path.stem)]
    asked, texts = every[::2], every[1::2]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        (folder / "text").mkdir()
        size, number = 0, 0
        while size < megabytes * 1e6:
            text = "\n".join([*draw.choices(texts, k=8), *([] if number % 50 else draw.choices(asked))])
            size, number = size + len(text.encode()), number + 1
            (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
        preprocess([str(folder / "text")], folder / "corpus", "huggingface", folder / "tokenizer")
        tokenizer = load_tokenizer("huggingface", folder / "tokenizer")
        prefix = str(folder / "corpus_text_document")
        items = [Item("own", at, text, text[::-1]) for at, text in enumerate(asked)]
        indexed = open_indexed(prefix)
        start = time.perf_counter()
        for document in range(indexed.documents):
            tokenizer.decode(indexed.document(document).tolist())
        decoding = time.perf_counter() - start
        start = time.perf_counter()
        found = find_overlaps(items, [prefix], tokenizer)
        searching = time.perf_counter() - start
    assert found.found
    print(f"{len(found.found)} of {len(items)} items found, {found.documents:,} documents")
    print(f"{found.text_bytes / 1e6:.1f} MB of text")
    print(f"decoding alone   {found.text_bytes / 1e6 / decoding:8.1f} MB/s (bound)")
    print(f"contamination    {found.text_bytes / 1e6 / searching:8.1f} MB/s")


if __name__ == "__main__":
    main()
