"""Reading training data: random reads, samples through the ledger, mixing many corpora, against megatron-core's.

    python benchmarks/dataset.py [--documents 40000] [--samples 4000] [--blend 5000000] [--ledger 100000000]

What is compared is first held to be right: the same tokens of the same documents; over an epoch, each token predicted
once (as the baseline's samples do); shares of a mixture off by no more than one sample per corpus. Then each way runs
in turn, so that whatever else the machine does hits all, and a ratio is the median of the rounds' ratios. Memory is
what a process of its own has resident at most, beyond what it had before (Linux).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore", module="megatron")  # optional packages that are not here

from megatron.core.datasets import helpers  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

from steel_megatron.data.indexed.dataset import open_indexed  # noqa: E402
from steel_megatron.data.indexed.writer import IndexedWriter  # noqa: E402
from steel_megatron.data.ledger.ledger import Ledger  # noqa: E402
from steel_megatron.data.ledger.loader import LedgerSamples, micro_batches, read_samples  # noqa: E402
from steel_megatron.data.sampling.interleave import Interleave  # noqa: E402

LENGTH = 2048
VOCABULARY = 151_936
MICRO_BATCH = 8
Ways = dict[str, Callable[[], object]]


def race(title: str, ways: Ways, rounds: int, per_round: int, unit: str) -> None:
    """Time the ways in turn and print a line each; the last one is the baseline."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    baseline = list(ways)[-1]
    print(f"\n{title}")
    for name, values in seconds.items():
        ratio = statistics.median(p / v for v, p in zip(values[1:], seconds[baseline][1:], strict=True))
        each = 1e6 * statistics.median(values[1:]) / per_round
        print(f"  {name:<44}{each:>12.3f} us/{unit}{ratio:>9.2f}x the baseline")


def write_corpus(prefix: Path, documents: int, seed: int = 0) -> str:
    """Documents of 1 to 8,000 random ids, about 1,000 on average."""
    draw = np.random.default_rng(seed)
    sizes = np.clip(draw.lognormal(6.4, 1.0, documents), 1, 8000).astype(np.int64)
    with IndexedWriter(prefix, np.int32) as writer:
        for part in np.array_split(sizes, max(1, documents // 1000)):
            writer.add_documents(draw.integers(0, VOCABULARY, int(part.sum()), dtype=np.int32), part)
        writer.finalize({})
    return str(prefix)


def random_reads(prefix: str, count: int, rounds: int) -> None:
    """2,049 tokens from random places of documents that have as many."""
    ours, theirs = open_indexed(prefix), IndexedDataset(prefix)
    draw = np.random.default_rng(1)
    documents = draw.choice(np.flatnonzero(ours.sizes > LENGTH), count)
    places = [(int(d), int(draw.integers(0, ours.sizes[d] - LENGTH))) for d in documents]
    for document, offset in places:
        own = ours.tokens_of(document, offset, LENGTH + 1)
        assert np.array_equal(own, theirs.get(document, offset, LENGTH + 1)), (document, offset)
    ways: Ways = {
        "IndexedCorpus.tokens_of": lambda: [ours.tokens_of(d, o, LENGTH + 1).sum() for d, o in places],
        "megatron.core IndexedDataset.get": lambda: [theirs.get(d, o, LENGTH + 1).sum() for d, o in places],
    }
    race(f"Random reads of {LENGTH + 1:,} tokens (and their sum)", ways, rounds, count, "read")


def megatron_samples(prefix: str, cache: Path) -> GPTDataset:
    """One epoch of megatron-core's dataset over the same corpus, with masks made no dearer than they must be."""
    tokenizer = SimpleNamespace(eod=VOCABULARY - 1, pad=VOCABULARY - 2, vocab_size=VOCABULARY, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = IndexedDataset(prefix)
    indices = np.arange(len(dataset.sequence_lengths), dtype=np.int32)
    return GPTDataset(dataset, prefix, indices, None, Split.train, config)


def samples(prefix: str, folder: Path, count: int, rounds: int) -> None:
    """Micro batches of tokens and labels through the ledger, against a loop over megatron-core's dataset."""
    ledger = Ledger.create([prefix], sequence_length=LENGTH, seed=1234, epochs=None)
    ours = LedgerSamples(ledger, VOCABULARY, folder / "cache")
    theirs = megatron_samples(prefix, folder / "megatron")
    epoch = ledger.history.samples(0)
    assert abs(len(theirs) - epoch) <= 1, (len(theirs), epoch)
    predicted = np.bincount(np.concatenate([ours.sample(n)[1:] for n in range(len(theirs))]), minlength=VOCABULARY)
    expected = np.bincount(
        torch.cat([theirs[n]["labels"] for n in range(len(theirs))]).numpy(), minlength=VOCABULARY
    )  # but for the ids that the baseline takes for padding
    assert np.abs(predicted - expected).sum() <= 2 * LENGTH + 64, "the two do not predict the same tokens"
    count = min(count, len(theirs)) // MICRO_BATCH * MICRO_BATCH

    def through_the_ledger() -> None:
        for numbers in micro_batches(0, count, MICRO_BATCH, 0, 1):
            tokens = torch.from_numpy(read_samples(ours, numbers, with_starts=False)[0])
            tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(MICRO_BATCH, LENGTH)

    def by_megatron() -> None:
        for first in range(0, count, MICRO_BATCH):
            torch.utils.data.default_collate([theirs[first + n] for n in range(MICRO_BATCH)])

    ways: Ways = {"ledger and loader": through_the_ledger, "megatron.core GPTDataset, default_collate": by_megatron}
    race(f"Micro batches of {MICRO_BATCH} samples of {LENGTH:,} tokens", ways, rounds, count, "sample")


def blending(size: int, corpora: int, rounds: int) -> None:
    """The corpus and the sample at every position of a mixture."""
    draw = np.random.default_rng(2)
    weights = draw.dirichlet(np.ones(corpora))
    counts = np.floor(weights * size).astype(np.int64)
    counts[0] += size - counts.sum()
    index, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        return Interleave(counts, (7,)).slice(0, size)

    def theirs() -> None:
        helpers.build_blending_indices(index, numbers, (counts / size).tolist(), corpora, size, False)

    mixed, own_numbers = ours()
    theirs()
    for corpus in range(corpora):
        assert np.array_equal(own_numbers[mixed == corpus], np.arange(counts[corpus])), corpus
    for part in (size // 7, size // 2, size - 1):
        off = [np.abs(np.bincount(of[:part], minlength=corpora) - counts / size * part).max() for of in (mixed, index)]
        assert off[0] <= max(2.0, off[1]), f"shares are off by {off[0]:.1f} samples, the baseline's by {off[1]:.1f}"
    ways: Ways = {
        "Interleave: the first 4,096 positions": lambda: Interleave(counts, (7,)).slice(0, 4096),
        "Interleave: all positions": ours,
        "megatron.core build_blending_indices": theirs,
    }
    race(f"Mixing {corpora} corpora, {size:,} samples", ways, rounds, size, "sample")


def resident(field: str) -> float:
    """MiB of this process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def build_large(folder: str, total: int) -> dict[str, float]:
    """A ledger of ``total`` samples over two corpora of sparse files, to its first sample of the middle."""
    length = 128
    prefixes = [sparse_corpus(Path(folder) / name, total * length // 2560 + n, 1280) for n, name in enumerate("ab", 1)]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest is now what it is at present
    before, started = resident("VmRSS"), time.perf_counter()
    ledger = Ledger.create(prefixes, sequence_length=length, seed=1, epochs=None)
    made = time.perf_counter() - started
    stream = LedgerSamples(ledger, VOCABULARY, Path(folder) / "cache")
    stream.sample(total // 2)
    indexed = time.perf_counter() - started
    again = time.perf_counter()
    LedgerSamples(ledger, VOCABULARY, Path(folder) / "cache").sample(total // 2)
    return {
        "the ledger itself, seconds": made,
        "to the first sample, seconds": indexed,
        "again, from the caches, seconds": time.perf_counter() - again,
        "highest resident memory, MiB": resident("VmHWM") - before,
    }


def sparse_corpus(prefix: Path, documents: int, size: int) -> str:
    """Documents of one size whose tokens are all 0, in a file that takes no room on disk, and their manifest."""
    from steel_megatron.data.indexed.checksums import BLOCK_BYTES
    from steel_megatron.data.indexed.format import HEADER, MAGIC
    from steel_megatron.data.indexed.manifest import FORMAT, content_of

    lengths = np.full(documents, size, np.int32)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(lengths.tobytes())
        file.write((np.arange(documents, dtype=np.int64) * (2 * size)).tobytes())
        file.write(np.arange(documents + 1, dtype=np.int64).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * size * documents)
    zeros = memoryview(bytes(BLOCK_BYTES))
    rest = 2 * size * documents % BLOCK_BYTES
    digests = [hashlib.sha256(zeros).hexdigest()] * (2 * size * documents // BLOCK_BYTES)
    digests += [hashlib.sha256(zeros[:rest]).hexdigest()] if rest else []
    index = Path(f"{prefix}.idx").read_bytes()
    parts = [index[at : at + BLOCK_BYTES] for at in range(0, len(index), BLOCK_BYTES)]
    blocks = {"bin": digests, "idx": [hashlib.sha256(part).hexdigest() for part in parts]}
    manifest = {
        **{"format": FORMAT, "documents": documents, "tokens": size * documents, "dtype": "uint16", "max_id": 0},
        **{"block_bytes": BLOCK_BYTES, "blocks": blocks, "content": content_of("uint16", blocks), "name": prefix.name},
    }
    Path(f"{prefix}.json").write_text(json.dumps(manifest), encoding="utf-8")
    return str(prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"documents": 40_000, "samples": 4000, "blend": 5_000_000, "corpora": 256, "rounds": 7}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ledger", type=int, default=100_000_000, help="samples of the large ledger; 0 for none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder) / "corpus", arguments.documents)
        random_reads(prefix, arguments.samples, arguments.rounds)
        samples(prefix, Path(folder), arguments.samples, arguments.rounds)
        blending(arguments.blend, arguments.corpora, arguments.rounds)
        if arguments.ledger:
            print(f"\nA ledger of {arguments.ledger:,} samples over two corpora, 20 documents of 1,280 tokens for 200")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                facts: dict[str, Any] = pool.apply(build_large, (folder, arguments.ledger))
            for name, value in facts.items():
                print(f"  {name:<44}{value:>12.2f}")


if __name__ == "__main__":
    sys.exit(main())
