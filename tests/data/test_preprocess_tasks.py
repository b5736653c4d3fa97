"""How work is cut and handed out: bounded tasks, linear time, and workers that nobody waits for when it is over."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest

from steel_megatron.data import encoding, encoding_workers, preprocess
from steel_megatron.data.encoding import Encoded, Position, Task
from steel_megatron.data.encoding_workers import encoded
from steel_megatron.data.job_journal import InputFile, examine
from steel_megatron.data.preprocess_run import _tasks
from steel_megatron.data.sources import Input, get_source
from tests.data.conftest import write_jsonl


def examined(path: Path, source: str = "text") -> InputFile:
    return examine(Input(path, source))


class _Slow:
    """Stands for an encoder; the first task is quick."""

    def encode(self, task: Task) -> Encoded:
        time.sleep(60 if task.end.input else 0)
        return Encoded({}, [])


def test_nobody_waits_for_workers_whose_results_are_thrown_away() -> None:
    tasks = (Task((), Position(number)) for number in range(4))
    results = encoded(tasks, _Slow(), workers=2)  # type: ignore[arg-type]
    assert next(results)[0] == Position(0)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert time.monotonic() - begun < 20, "a scheduler kills after 30 seconds"


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


def test_workers_that_die_at_once_are_noticed(tmp_path: Path) -> None:
    """Also when they were to be started with more than a pipe holds: here the script starts workers when imported."""
    script = tmp_path / "script.py"
    script.write_text(
        "from steel_megatron.data.encoding import Position, Task\n"
        "from steel_megatron.data.encoding_workers import encoded\n"
        "list(encoded(iter([Task((), Position(1))]), b'x' * 10_000_000, workers=2))\n"
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
    groups = list(encoding._groups(texts, 10_000))
    assert [len(group) for group in groups] == [1000] * 3 and looked <= 3 * len(texts)
    assert list(encoding._groups(["aaaa", "b", "c", "dd"], 3)) == [["aaaa"], ["b", "c"], ["dd"]]


def test_no_task_has_more_than_a_chunk(tmp_path: Path) -> None:
    # The small rest of one file does not go with the large beginning of the next.
    files = [examined(write_jsonl(tmp_path / f"{n}.jsonl", ["x" * size])) for n, size in enumerate((300, 900, 30, 40))]
    sources = {"text": {"text": get_source("text")}}
    tasks = list(_tasks(files, sources, Position(), 1000, lambda _: None))
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
    preprocess._verify_engine(tokenizer, files, sources)  # type: ignore[arg-type]
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
