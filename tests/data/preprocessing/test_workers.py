"""How work is cut and handed out: bounded tasks, linear time, and workers that nobody waits for when it is over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from steel_megatron.config import TokenizerEngine
from steel_megatron.data.preprocessing import pipeline
from steel_megatron.data.preprocessing import step as preprocess_step
from steel_megatron.data.preprocessing import workers as encoding_workers
from steel_megatron.data.preprocessing.encoder import Encoded, Encoder, Position, Task, Unwanted
from steel_megatron.data.preprocessing.inputs import InputFile, examine
from steel_megatron.data.preprocessing.step import ChunkSizes, EncodeUnits, units_of
from steel_megatron.data.preprocessing.workers import encoded
from steel_megatron.data.reading.formats import read_chunks
from steel_megatron.data.reading.inputs import Input
from steel_megatron.data.reading.sources import get_source
from steel_megatron.data.tokenizing.chunking import groups
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from tests.data.configured import preprocess
from tests.data.conftest import write_jsonl
from tests.data.jobs import THREADS


def examined(path: Path, source: str = "text") -> InputFile:
    return examine(Input(str(path), source))


class _Slow:
    """Stands for an encoder; the first task is quick."""

    unwanted: threading.Event | None = None
    begun: ClassVar = threading.Event()
    waited: ClassVar[list[bool]] = []

    def __init__(self, by_threads: bool) -> None:
        self.by_threads = by_threads

    def for_thread(self, unwanted: threading.Event) -> _Slow:
        twin = _Slow(self.by_threads)
        twin.unwanted = unwanted
        return twin

    def encode(self, task: Task) -> Encoded:
        if task.end.input and self.unwanted is None:
            time.sleep(60)
        elif task.end.input and self.unwanted is not None:
            self.begun.set()
            self.waited.append(self.unwanted.wait(60))
        return Encoded({}, [])


@pytest.mark.slow
@pytest.mark.parametrize("by_threads", [True, False])
def test_nobody_waits_for_workers_whose_results_are_thrown_away(by_threads: bool) -> None:
    tasks = (Task((), Position(number)) for number in range(4))
    others = active_children()
    results = encoded(tasks, _Slow(by_threads), workers=2)  # type: ignore[arg-type]
    assert next(results)[0] == Position(0)
    workers = [child for child in active_children() if child not in others]
    assert not by_threads or _Slow.begun.wait(60)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    if by_threads:
        assert all(_Slow.waited) and not workers  # they were told, and did not come to the end of their wait
    else:
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2


def test_a_long_text_is_given_up_when_nobody_wants_it(tmp_path: Path, hf_folder: Path) -> None:
    source = write_jsonl(tmp_path / "long.jsonl", ["a line of text\n" * 20])
    chunk = next(read_chunks(source))
    tokenizer = load_tokenizer("huggingface", hf_folder, engine="gigatoken")
    encoder = Encoder(tokenizer, np.dtype(np.int32), {"text": {"text": get_source("text")}}, long=100)
    unwanted = threading.Event()
    twin, task = encoder.for_thread(unwanted), Task(((0, "text", chunk),), Position(1))
    assert np.array_equal(
        twin.encode(task).documents["train", "text"].ids[:-1], tokenizer.encode("a line of text\n" * 20)
    )
    unwanted.set()
    with pytest.raises(Unwanted):
        twin.encode(task)
    assert encoder.encode(task).documents.keys() == {("train", "text")}


class _Broken(_Slow):
    """The second task fails."""

    def for_thread(self, unwanted: threading.Event) -> _Slow:
        return self

    def encode(self, task: Task) -> Encoded:
        if task.end.input == 1:
            raise MemoryError("no room")
        return Encoded({}, [])


def test_what_a_thread_raises_arrives_in_its_turn() -> None:
    before = threading.active_count()
    results = encoded((Task((), Position(number)) for number in range(4)), _Broken(True), workers=2)  # type: ignore[arg-type]
    assert next(results)[0] == Position(0)
    with pytest.raises(MemoryError, match="no room"):
        next(results)
    assert threading.active_count() == before, "its threads have ended"


def test_who_encodes_by_threads(tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for what is compiled, and processes for rows that Python has to put together."""
    asked: list[bool] = []

    def watched(tasks: Any, encoder: Encoder, workers: int) -> Any:
        asked.append(encoder.by_threads)
        return encoded(tasks, encoder, 1)

    monkeypatch.setattr(preprocess_step, "encoded", watched)
    plain = write_jsonl(tmp_path / "plain.jsonl", [f"text {number}" for number in range(100)])
    (tmp_path / "notes.txt").write_text("text of a file")
    turns = [{"text": f"<|im_start|>user\n{number}<|im_end|>", "dialogue": True} for number in range(100)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    (tmp_path / "firefly.jsonl").write_text('{"input": "q", "target": "a"}\n')
    kinds: list[tuple[list[str], TokenizerEngine, bool]] = [
        ([str(plain)], "auto", True),
        ([f"skypile={plain}"], "auto", True),
        ([str(plain)], "tokenizers", False),  # its library lets one thread go on at a time
        ([str(plain), str(tmp_path / "turns.jsonl")], "auto", False),  # the file in the middle
        ([str(tmp_path / "notes.txt")], "auto", False),
        ([str(plain), f"firefly={tmp_path}/firefly.jsonl"], "auto", False),
    ]
    for number, (inputs, engine, expected) in enumerate(kinds):
        preprocess(inputs, tmp_path / f"out{number}", "sentencepiece", sp_model, engine=engine)
        assert asked.pop() == (expected and THREADS), inputs


def test_a_worker_that_died_in_the_middle_of_a_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = get_context("spawn").Process(target=time.time)  # one that is not alive
    worker.start()
    worker.join()
    pool = ProcessPoolExecutor(1)
    pool._processes = {1: worker}  # type: ignore[dict-item]
    monkeypatch.setattr(encoding_workers, "_LOOK_SECONDS", 0.01)
    with pytest.raises(BrokenProcessPool):
        encoding_workers._result(pool, Future())
    done: Future[Encoded] = Future()
    done.set_result(Encoded({}, []))
    assert encoding_workers._result(pool, done) == Encoded({}, [])


@pytest.mark.slow
def test_workers_that_die_at_once_are_noticed(tmp_path: Path) -> None:
    """Also when they were to be started with more than a pipe holds: here the script starts workers when imported."""
    script = tmp_path / "script.py"
    script.write_text(
        "from steel_megatron.data.preprocessing.encoder import Position, Task\n"
        "from steel_megatron.data.preprocessing.workers import encoded\n"
        "class Large:\n"
        "    by_threads, content = False, b'x' * 10_000_000\n"
        "    def __reduce__(self):\n"
        "        return bytes, (self.content,)\n"
        "list(encoded(iter([Task((), Position(1))]), Large(), workers=2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "one of 2 worker processes died" in done.stderr


def test_many_short_texts_are_grouped_in_linear_time() -> None:
    looked = 0

    class Text(str):
        def __len__(self) -> int:
            nonlocal looked
            looked += 1
            return super().__len__()

    texts = [Text("x" * 10) for _ in range(3000)]
    found = list(groups(texts, 10_000))
    assert [len(group) for group in found] == [1000] * 3 and looked <= 3 * len(texts)
    assert list(groups(["aaaa", "b", "c", "dd"], 3)) == [["aaaa"], ["b", "c"], ["dd"]]


def test_no_task_has_more_than_a_chunk(tmp_path: Path) -> None:
    # The small rest of one file does not go with the large beginning of the next.
    files = [examined(write_jsonl(tmp_path / f"{n}.jsonl", ["x" * size])) for n, size in enumerate((300, 900, 30, 40))]
    encoder = Encoder(None, np.dtype(np.int32), {"text": {"text": get_source("text")}})  # type: ignore[arg-type]
    step = EncodeUnits(tmp_path / "job", tuple(files), units_of(files), encoder, (("train", "text"),), ChunkSizes(1000))
    assert step.units == ((0, 4),)
    tasks = list(step._tasks(0, []))
    assert [[number for number, *_ in task.pieces] for task in tasks] == [[0], [1], [2, 3]]
    assert all(task.bytes <= 1000 for task in tasks)
    assert [task.end.input for task in tasks] == [0, 1, 3]


# ---------------------------------------------------------------- the sample for the fast engine


class _Sampled:
    """Stands for a tokenizer; keeps what it is to be compared on."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def verify_on(self, texts: list[str]) -> None:
        self.texts += texts


def sampled(files: list[InputFile]) -> list[str]:
    tokenizer = _Sampled()
    sources = {"text": {name: get_source(name) for name in {file.source for file in files}}}
    pipeline._verify_engine(tokenizer, files, sources)  # type: ignore[arg-type]
    return tokenizer.texts


def test_the_fast_engine_is_compared_on_every_source_and_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").touch()
    (tmp_path / "1.jsonl").write_text("broken\n")
    for number in range(2, 7):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"text {number}"])
    (tmp_path / "7.jsonl").write_text('{"input": "q", "target": "a"}\n')
    files = [examined(tmp_path / f"{number}.jsonl", "firefly" if number == 7 else "text") for number in range(8)]
    first, of_firefly, middle = sampled(files)
    assert (first, middle) == ("text 2", "text 4") and of_firefly.endswith("assistant\na<|im_end|>")


def test_the_sample_is_shared(tmp_path: Path) -> None:
    text = "word " * 100_000
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip")  # which is said when its turn comes
    files = [examined(tmp_path / "broken.jsonl.gz"), examined(write_jsonl(tmp_path / "b.jsonl", [text]))]
    assert [len(text) for text in sampled(files)] == [50_000, 50_000]
