"""Tokenizing a corpus: ours, a loop in Megatron's style, datatrove's, and the bare tokenizer engine.

    python benchmarks/preprocess.py [--tokenizer FOLDER] [--input FILE.jsonl] [--megabytes 500] [--slice 10]

Without an input, texts are made from the examples' corpus, Python's standard library and random words, no two alike;
without a tokenizer, a byte-level BPE is trained on them. All ways read the same JSON lines with two workers and write
Megatron's files; the engine by itself has two threads and writes nothing: ``engine_alone`` gets texts that are in
memory, parsed already; ``engine_reads`` parses the file by its own reader, which drops good texts around a bad line.
First, ours and the loop are held to write the same .bin, gigatoken's reader to make the same ids (else it is left out),
and datatrove the same documents (its files have another order). The slow ways get the
first ``--slice`` megabytes of the same file; what is compared is MB of input per second, in turn, as the median of the
rounds' ratios. Ours writes a validation split, as in real use. Rates are steady ones: a tenth of the input is timed too
and taken off, so that starting does not count: below some hundred megabytes its noise is larger than what is left. CPU
seconds are of all processes.

    python benchmarks/preprocess.py --memory 1000 10000

prints the highest resident memory of ours, over all its processes, for inputs of so many megabytes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import tokenizers

from steel_megatron.data.indexed.dataset import open_indexed

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2


def pieces() -> list[str]:
    """Sentences and lines to build texts from."""
    found = []
    for path in sorted((ROOT / "examples/quickstart/corpus").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found += [part + "。" for part in json.loads(line)["text"].split("。") if part]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return found


def texts(total: int) -> Iterator[str]:
    """Documents of about 4 KB, no two alike, until ``total`` bytes; a tenth of each is words nobody has seen."""
    draw, parts, size = random.Random(0), pieces(), 0
    while size < total:
        words = []
        for _ in range(draw.randint(20, 120)):
            words.append(draw.choice(parts))
            if draw.random() < 0.2:
                low, high = draw.choice([(0x4E00, 0x9FA5), (0x61, 0x7A)])
                words.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(2, 12))) + " ")
        text = "".join(words)
        size += len(text.encode())
        yield text


def write_corpus(path: Path, total: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts(total):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE with an end-of-document token, as a Hugging Face folder."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(4_000_000), vocab_size=16_000, special_tokens=["<eod>"], show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}), encoding="utf-8")


# ---- the ways; each is run in a process of its own ----


def ours(corpus: str, tokenizer: str, output: str) -> None:
    _preprocess(corpus, tokenizer, output, valid_fraction=0.01)


def ours_whole(corpus: str, tokenizer: str, output: str) -> None:
    """Without a split: one file, to be compared byte for byte."""
    _preprocess(corpus, tokenizer, output)


def _preprocess(corpus: str, tokenizer: str, output: str, valid_fraction: float = 0.0) -> None:
    from steel_megatron.config import PreprocessConfig
    from steel_megatron.data.preprocessing.pipeline import preprocess

    preprocess(
        PreprocessConfig(
            inputs=[corpus],
            output_prefix=output,
            tokenizer_path=tokenizer,
            workers=WORKERS,
            valid_fraction=valid_fraction,
        )
    )


_of_worker: tokenizers.Tokenizer | None = None


def _start(folder: str) -> None:
    global _of_worker
    from steel_megatron.data.tokenizing.tokenizer import HuggingFaceTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _of_worker = HuggingFaceTokenizer(folder)._tokenizer


def _encode(line: str) -> list[int]:
    assert _of_worker is not None
    return _of_worker.encode(json.loads(line)["text"], add_special_tokens=False).ids


def megatron_style(corpus: str, tokenizer: str, output: str) -> None:
    """A document at a time through a pool of processes, into megatron-core's builder."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from steel_megatron.data.indexed.dataset import token_dtype
    from steel_megatron.data.tokenizing.tokenizer import HuggingFaceTokenizer

    facts = HuggingFaceTokenizer(tokenizer)
    dtype = token_dtype(facts.vocab_size).type
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype)
    with (
        multiprocessing.get_context("spawn").Pool(WORKERS, _start, (tokenizer,)) as pool,
        open(corpus, encoding="utf-8") as file,
    ):
        for ids in pool.imap(_encode, file, 32):
            ids.append(facts.eod_id)
            builder.add_document(torch.from_numpy(np.array(ids, dtype=np.int64)), [len(ids)])
    builder.finalize(f"{output}.idx")


def datatrove(corpus: str, tokenizer: str, output: str) -> None:
    """datatrove's own reader and writer, a task for each process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    folder = Path(f"{output}.parts")
    folder.mkdir()
    lines = Path(corpus).read_bytes().splitlines(keepends=True)
    for part in range(WORKERS):
        (folder / f"{part}.jsonl").write_bytes(b"".join(lines[part::WORKERS]))
    settings = json.loads(Path(tokenizer, "tokenizer_config.json").read_text(encoding="utf-8"))
    eod = settings["eos_token"]
    writer = MegatronDocumentTokenizer(
        output_folder=f"{output}.out",
        tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
        eos_token=eod if isinstance(eod, str) else eod["content"],
    )
    LocalPipelineExecutor(
        [JsonlReader(str(folder)), writer],
        tasks=WORKERS,
        workers=WORKERS,
        logging_dir=f"{output}.logs",
        start_method="spawn",  # children of this process, whose CPU seconds count
    ).run()


@contextmanager
def own_seconds(output: str) -> Iterator[None]:
    """Leaves the seconds of what is within, to be taken instead of those of the process."""
    cpu, started = time.process_time(), time.perf_counter()
    yield
    Path(f"{output}.seconds").write_text(f"{time.perf_counter() - started} {time.process_time() - cpu}")


def engine_alone(corpus: str, tokenizer: str, output: str) -> None:
    """gigatoken's batch call over texts in memory, all at once; writes nothing but its own seconds."""
    import gigatoken

    engine = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    with open(corpus, encoding="utf-8") as file:
        batch = [json.loads(line)["text"] for line in file]
    with own_seconds(output):
        engine.encode_batch(batch, parallel=True)


def engine_reads(corpus: str, tokenizer: str, output: str) -> None:
    """gigatoken's own reader of JSON lines, from the file to ids in memory; those are written beside its seconds."""
    import awkward
    import gigatoken

    engine = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    source = gigatoken.JsonlFileSource([corpus])
    with own_seconds(output):
        found = engine.encode_files(source, parallel=True)
    np.save(f"{output}.npy", awkward.to_numpy(awkward.flatten(found)))


WAYS: dict[str, Callable[[str, str, str], None]] = {
    "ours": ours,
    "ours_whole": ours_whole,
    "megatron_style": megatron_style,
    "datatrove": datatrove,
    "engine_alone": engine_alone,
    "engine_reads": engine_reads,
}


def timed(way: str, corpus: Path, tokenizer: Path, output: Path) -> tuple[float, float]:
    """Seconds of the wall and of processors that a way takes in a process of its own."""
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir(parents=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, str(Path(__file__).resolve()), "--way", way, str(corpus), str(tokenizer), str(output)]
    done = subprocess.run(words, env={**os.environ, "RAYON_NUM_THREADS": str(WORKERS)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {way} failed\n{done.stderr[-2000:]}")
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    own = Path(f"{output}.seconds")
    if own.exists():
        wall, cpu = map(float, own.read_text().split())
        return wall, cpu
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_part(corpus: Path, size: int, part: Path) -> Path:
    """The first lines of a corpus, about ``size`` bytes, as a file of their own."""
    with corpus.open("rb") as file:
        part.write_bytes(b"".join(file.readlines(size)))
    return part


def documents_of(*prefixes: Path) -> list[bytes]:
    """The ids of all documents of some corpora, sorted."""
    corpora = [open_indexed(prefix) for prefix in prefixes]
    return sorted(corpus.document(n).astype("<i4").tobytes() for corpus in corpora for n in range(corpus.documents))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    corpus, tokenizer = prepared(arguments, folder)
    small = first_part(corpus, arguments.slice * 1_000_000, folder / "slice.jsonl")
    names = ["ours", "engine_alone", "engine_reads", "megatron_style", "datatrove"]
    for package, ways in (("gigatoken", ("engine_alone", "engine_reads")), ("datatrove", ("datatrove",))):
        if find_spec(package) is None:
            print(f"{package} is not installed, and left out (pip install 'steel-megatron[data]')")
            names = [name for name in names if name not in ways]
    timed("ours_whole", small, tokenizer, folder / "a/x")
    timed("megatron_style", small, tokenizer, folder / "b/x")
    if (folder / "a/x_text_document.bin").read_bytes() != (folder / "b/x.bin").read_bytes():
        sys.exit("error: ours and the loop wrote different .bin files")
    if "engine_reads" in names:
        timed("engine_reads", small, tokenizer, folder / "c/x")
        whole = open_indexed(folder / "a/x_text_document")
        bodies = [whole.document(number)[:-1] for number in range(whole.documents)]
        if not np.array_equal(np.concatenate(bodies), np.load(folder / "c/x.npy")):
            print("gigatoken's reader made other ids (of control tokens, rare characters or bad lines): it is left out")
            names.remove("engine_reads")
    if "datatrove" in names:
        timed("datatrove", small, tokenizer, folder / "c/x")
        parts = [path.with_suffix("") for path in sorted((folder / "c/x.out").glob("*.idx"))]
        if documents_of(folder / "a/x_text_document") != documents_of(*parts):
            sys.exit("error: ours and datatrove wrote different documents")
    speeds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            data = small if name in ("megatron_style", "datatrove") else corpus
            head = first_part(data, data.stat().st_size // 10, folder / "head.jsonl")
            few, many = (timed(name, part, tokenizer, folder / "c/x") for part in (head, data))
            megabytes = (data.stat().st_size - head.stat().st_size) / 1e6
            speeds[name].append(megabytes / (many[0] - few[0]))
            cpu[name].append(megabytes / (many[1] - few[1]))
    print(
        f"{corpus.stat().st_size / 1e6:.0f} MB of JSON lines; the slow ways had the first "
        f"{small.stat().st_size / 1e6:.0f} MB"
    )
    print(f"{'':<18}{'MB/s':>10}{'MB/CPU-s':>10}{'ours is':>10}")
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        of_cpu = f"{rate:.2f}" if (rate := statistics.median(cpu[name])) > 0 else "-"  # lost in what starting takes
        print(f"{name:<18}{statistics.median(speeds[name]):>10.2f}{of_cpu:>10}{ratio:>9.2f}x")


def prepared(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The corpus and the tokenizer, made if not given."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    if arguments.input:
        corpus = Path(arguments.input)
    else:
        write_corpus(corpus, arguments.megabytes * 1_000_000)
    if arguments.tokenizer:
        from steel_megatron.data.tokenizing.tokenizer import HuggingFaceTokenizer

        HuggingFaceTokenizer(arguments.tokenizer).save_pretrained(tokenizer)  # tokenizer.json, which all ways read
    else:
        train_tokenizer(tokenizer)
    return corpus, tokenizer


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    for megabytes in arguments.memory:
        arguments.megabytes = megabytes
        work = folder / str(megabytes)
        work.mkdir()
        corpus, tokenizer = prepared(arguments, work)
        words = [sys.executable, str(Path(__file__).resolve()), "--way", "ours", str(corpus), str(tokenizer)]
        job = subprocess.Popen([*words, str(work / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        highest = 0
        while job.poll() is None:
            try:
                process = psutil.Process(job.pid)
                family = [process, *process.children(recursive=True)]
                highest = max(highest, sum(one.memory_info().rss for one in family))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.2)
        if job.returncode:
            sys.exit("error: ours failed")
        print(f"{megabytes:>8,} MB: at most {highest / 2**20:,.0f} MiB resident", flush=True)
        shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer")
    parser.add_argument("--input", help="a .jsonl file with the key text")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--slice", type=int, default=10, help="megabytes for the slow ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", help="megabytes of the inputs")
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        name, corpus, tokenizer, output = arguments.way
        WAYS[name](corpus, tokenizer, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        (memory if arguments.memory else compare)(arguments, Path(folder))


if __name__ == "__main__":
    main()
