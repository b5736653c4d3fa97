"""What goes wrong around a preprocessing job: bad rows, broken files, full disks, dying processes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pyarrow
import pytest
import zstandard
from pyarrow import parquet as writer

from steel_megatron.data.indexed.dataset import open_indexed
from steel_megatron.data.preprocessing.step import ChunkSizes, EncodeUnits
from steel_megatron.data.tokenizing.tokenizer import SentencePieceTokenizer
from steel_megatron.errors import DataError
from tests import needs
from tests.data.configured import preprocess
from tests.data.conftest import make_texts, write_jsonl
from tests.data.jobs import (
    PACE,
    THREADS,
    files_in,
    let_go,
    mixed_inputs,
    segments_in,
    start_job,
    wait_for,
    wait_gone,
    workers_of,
)

# ---------------------------------------------------------------- rows

BAD_ROWS = {
    "broken JSON": b'{"text": "x"',
    "a JSON list where an object was expected": b'["x", 1]',
    "key 'text' is missing; the row has 'body'": b'{"body": "x"}',
    "key 'text' holds null": b'{"text": null}',
    "key 'text' holds a int": b'{"text": 3}',
    "not valid UTF-8": b'{"text": "\xff"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "JSON beyond any use": b"[" * 100_000,
}
FINE_ROWS = {
    b'\xef\xbb\xbf{"text": "byte order mark"}\n': ["byte order mark"],
    b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n': ["one", "two"],
    b'\n  \n{"text": "blank lines"}\n\n': ["blank lines"],
    b'{"text": "no final newline"}': ["no final newline"],
    b'{"text": "\\ud83d\\ude00 pair"}\n': ["\U0001f600 pair"],
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer, reason: str) -> None:
    source, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    source.write_bytes(b'{"text": "first"}\n' + BAD_ROWS[reason] + b'\n{"text": "last"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl, row 2, byte (1[89]|[2-9]\d|\d{3,}): ") as stopped:
        preprocess([str(source)], out / "c", "sentencepiece", sp_model)
    assert reason in str(stopped.value)
    assert not files_in(out)
    report = preprocess([str(source)], out / "c", "sentencepiece", sp_model, on_bad_row="skip")
    assert (report.documents, report.skipped) == (2, 1)
    corpus = open_indexed(report.outputs["train"])
    assert [corpus.document(index).tolist() for index in range(2)] == [
        [*sp.encode(text), sp.eod_id] for text in ("first", "last")
    ]
    (skipped,) = [json.loads(line) for line in (out / "c_skipped.jsonl").read_text().splitlines()]
    assert reason in skipped["reason"] and (skipped["source"], skipped["row"]) == (str(source), 2)
    assert skipped["raw"] == BAD_ROWS[reason][:2000].decode(errors="replace")


@pytest.mark.parametrize("content", FINE_ROWS)
def test_rows_that_are_fine(tmp_path: Path, sp_model: Path, sp: SentencePieceTokenizer, content: bytes) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(content)
    report = preprocess([str(tmp_path / "corpus.jsonl")], tmp_path / "c", "sentencepiece", sp_model, append_eod=False)
    corpus = open_indexed(report.outputs["train"])
    found = [corpus.document(index).tolist() for index in range(corpus.documents)]
    assert found == [sp.encode(text) for text in FINE_ROWS[content]] and report.skipped == 0


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.py"])
def test_an_empty_file_among_others(tmp_path: Path, sp_model: Path, name: str) -> None:
    write_jsonl(tmp_path / "full.jsonl", ["text"])
    (tmp_path / name).touch()
    report = preprocess([str(tmp_path)], tmp_path / "out" / "c", "sentencepiece", sp_model)
    assert report.documents == 1
    assert report.skipped == (name in ("x.txt", "x.py"))  # a document without text, not a file without rows


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(content)
    return zstandard.compress(content)


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    writer.write_table(pyarrow.table({"text": texts}), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_truncated_files_stop_the_job_and_keep_what_was_before(
    tmp_path: Path, sp_model: Path, suffix: str, policy: Any
) -> None:
    texts = make_texts(300)
    write_jsonl(tmp_path / "a.jsonl", texts[:150])
    rows = write_jsonl(tmp_path / "rows", texts[150:]).read_bytes()
    whole = parquet(texts[150:]) if suffix == "parquet" else compressed(rows, suffix.rpartition(".")[2])
    broken = tmp_path / f"b.{suffix}"
    broken.write_bytes(whole[: len(whole) * 3 // 4])
    inputs = [str(tmp_path / "a.jsonl"), str(broken)]
    for workers in (1, 2) if policy == "stop" and suffix == "jsonl.gz" else (1,):
        with pytest.raises(DataError, match=rf"b\.{suffix} is truncated or damaged.*is kept"):
            preprocess(
                inputs,
                tmp_path / "out" / "c",
                "sentencepiece",
                sp_model,
                on_bad_row=policy,
                workers=workers,
                pace=ChunkSizes(chunk_bytes=4096),
            )
    assert segments_in(tmp_path / "out")
    assert all(name.startswith("c.partial/") for name in files_in(tmp_path / "out"))
    broken.write_bytes(whole)
    report = preprocess(inputs, tmp_path / "out" / "c", "sentencepiece", sp_model, overwrite=True)
    assert report.documents == 300 and report.skipped == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_what_comes_first_is_said_first(tmp_path: Path, sp_model: Path, workers: int) -> None:
    # The broken file is read while the bad row before it is still on its way.
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\nbroken\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n')[:-4])
    pace = ChunkSizes(chunk_bytes=10)
    with pytest.raises(DataError, match=r"a\.jsonl, row 2, byte 17"):
        preprocess([str(tmp_path)], tmp_path / "out" / "c", "sentencepiece", sp_model, workers=workers, pace=pace)


@pytest.mark.usefixtures("file_modes_hold")
def test_an_unreadable_file(tmp_path: Path, sp_model: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["text"])
    source.chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*corpus\.jsonl: Permission denied"):
        preprocess([str(source)], tmp_path / "c", "sentencepiece", sp_model)


def test_a_file_that_goes_away(tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(20))
    pace = ChunkSizes(chunk_bytes=1000)
    (tmp_path / "b.jsonl").rename(tmp_path / "away")
    with pytest.raises(DataError, match="matches no file"):
        preprocess([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], tmp_path / "c", "sentencepiece", sp_model, pace=pace)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"(matches no file|cannot read .*b\.jsonl)"):
        preprocess([str(tmp_path)], tmp_path / "c", "sentencepiece", sp_model, pace=pace)


@pytest.mark.parametrize("folder", ["file/below", "/proc/nowhere", "/sys"])
def test_an_output_folder_that_cannot_be_written(tmp_path: Path, sp_model: Path, folder: str) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", ["text"])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*c\.lock: "):
        preprocess([str(source)], tmp_path / folder / "c", "sentencepiece", sp_model)


# ---------------------------------------------------------------- disks


@pytest.mark.slow
def test_a_full_disk_keeps_closed_segments(tmp_path: Path, sp_model: Path) -> None:
    # A limit on the size of files stands for the disk: writing beyond it fails as on a full one, but for the number.
    inputs = mixed_inputs(tmp_path, 600)
    options: dict[str, Any] = {"on_bad_row": "skip", "valid_fraction": 0.2}
    reference = preprocess(inputs, tmp_path / "whole" / "c", "sentencepiece", sp_model, **options)
    size = Path(f"{reference.outputs['train']}.bin").stat().st_size
    for limit in (size // 3, size * 2 // 3, size - 1):
        job = start_job(inputs, tmp_path / "out" / "c", sp_model, **options, pace={**PACE, "segment_bytes": 10_000})
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 2 and os.strerror(errno.EFBIG) in errors and "Traceback" not in errors, errors
        assert "File too large. What is written so far is kept" in errors
        assert segments_in(tmp_path / "out")
    report = preprocess(inputs, tmp_path / "out" / "c", "sentencepiece", sp_model, **options)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert report.sources == reference.sources


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        needs.mount.missing()
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_without_room(tmp_path: Path, sp_model: Path, small_disk: Path) -> None:
    inputs = mixed_inputs(tmp_path, 1200)
    options: dict[str, Any] = {"on_bad_row": "skip", "pace": ChunkSizes(8192, 50_000)}
    (small_disk / "other").write_bytes(bytes(600_000))
    with pytest.raises(DataError, match=r"No space left on device.*is kept"):
        preprocess(inputs, small_disk / "c", "sentencepiece", sp_model, **options)
    assert segments_in(small_disk)
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    preprocess(inputs, small_disk / "c", "sentencepiece", sp_model, **options)
    preprocess(inputs, tmp_path / "whole" / "c", "sentencepiece", sp_model, **options)
    assert files_in(small_disk) == files_in(tmp_path / "whole")


# ---------------------------------------------------------------- processes

_KILLED = """
import json, os, random, shutil, signal, sys
from pathlib import Path
from steel_megatron.config import PreprocessConfig
from steel_megatron.data.preprocessing.step import ChunkSizes, EncodeUnits
from steel_megatron.data.preprocessing.pipeline import preprocess

arguments, pace, whole, kills = json.loads(sys.argv[1])
prefix = Path(arguments["output_prefix"])
folder = prefix.with_name(f"{prefix.name}.partial")
draw = random.Random(0)

def run(prefix, last=0):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    preprocess(PreprocessConfig(**{**arguments, "output_prefix": str(prefix)}), ChunkSizes(**pace))
    sys.setprofile(None)
    return calls

def forked(last=0):
    child = os.fork()
    if child == 0:
        os._exit(0 if run(prefix, last) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0 or last and os.WTERMSIG(status) == signal.SIGKILL, status
    return status

run(whole)  # everything is imported now
calls = run(f"{whole}_again")
resumed = complete = 0
while kills:
    resumed += any(folder.glob("segments/*/*.json"))
    kills -= forked(draw.randint(1, calls * 4 // 5)) != 0
    if not folder.exists() and any(prefix.parent.glob("*.json")):
        complete += 1  # everything has its final name, whether or not the process came to its own end
        shutil.rmtree(prefix.parent)
forked()
print(resumed, complete)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("shard_size", "kills"), [(None, 8), (8000, 20)])
def test_killed_at_random_moments(tmp_path: Path, sp_model: Path, shard_size: int | None, kills: int) -> None:
    # A moment is a number of function calls: however slow the machine is, it falls into the work.
    arguments = {
        "inputs": mixed_inputs(tmp_path, 150),
        "output_prefix": str(tmp_path / "out" / "c"),
        "tokenizer_kind": "sentencepiece",
        "tokenizer_path": str(sp_model),
        "on_bad_row": "skip",
        "valid_fraction": 0.2,
        "shard_size": shard_size,
        "engine": "tokenizers",
    }
    pace = {"chunk_bytes": 4096, "segment_bytes": 1 << 13, "segment_seconds": 1e9}
    code = [sys.executable, "-c", _KILLED, json.dumps([arguments, pace, str(tmp_path / "whole" / "c"), kills])]
    done = subprocess.run(code, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    resumed, _ = map(int, done.stdout.split())
    assert resumed >= kills // 2, "hardly any run went on with the work of one that was killed"
    whole = {name: content for name, content in files_in(tmp_path / "whole").items() if not name.startswith("c_again")}
    assert files_in(tmp_path / "out") == whole


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Text for a few hundred tasks, in 1.3 MB."""
    texts = make_texts(200)
    return [str(write_jsonl(tmp_path_factory.mktemp("large") / "corpus.jsonl", [text * 3 for text in texts]))]


@pytest.fixture(scope="module")
def large_result(large_corpus: list[str], sp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed job makes of it."""
    out = tmp_path_factory.mktemp("large_result")
    preprocess(large_corpus, out / "c", "sentencepiece", sp_model)
    return files_in(out)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "engine"), [("worker", "tokenizers"), ("job", "tokenizers"), ("job", "auto")])
def test_a_killed_process(
    tmp_path: Path, sp_model: Path, large_corpus: list[str], large_result: dict[str, bytes], victim: str, engine: str
) -> None:
    out = tmp_path / "out"
    pace = {**PACE, "segment_bytes": 1}  # every task is noted
    job = start_job(large_corpus, out / "c", sp_model, workers=2, engine=engine, pace=pace, hold=str(tmp_path / "hold"))
    wait_for(job, tmp_path / "hold")
    workers = workers_of(job)
    assert len(workers) == (0 if engine == "auto" and THREADS else 2)
    os.kill(workers[0] if victim == "worker" else job.pid, signal.SIGKILL)
    let_go(tmp_path / "hold")
    _, errors = job.communicate(timeout=60)
    if victim == "worker":
        assert job.returncode == 2 and "error: one of 2 worker processes died" in errors and "Traceback" not in errors
        assert "the same command resumes there" in errors
    wait_gone(workers)
    assert segments_in(out) and all(name.startswith(("c.partial/", "c.lock")) for name in files_in(out))
    with pytest.raises(DataError):
        open_indexed(out / "c_text_document")
    preprocess(large_corpus, out / "c", "sentencepiece", sp_model)
    assert files_in(out) == large_result


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("workers", "engine"), [(1, "auto"), (2, "auto"), (2, "tokenizers")])
def test_a_stopped_job_resumes(
    tmp_path: Path,
    sp_model: Path,
    large_corpus: list[str],
    large_result: dict[str, bytes],
    number: int,
    code: int,
    workers: int,
    engine: str,
) -> None:
    out = tmp_path / "out"
    pace = {**PACE, "segment_bytes": 1 << 40, "segment_seconds": 1e9}  # nothing is noted but at the signal
    hold = tmp_path / "hold"
    job = start_job(large_corpus, out / "c", sp_model, workers=workers, pace=pace, engine=engine, hold=str(hold))
    wait_for(job, hold)
    children = workers_of(job)
    for pid in (job.pid, *children):  # a terminal and a scheduler send it to all
        os.kill(pid, number)
    let_go(hold)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code and "Traceback" not in errors, errors
    assert "What is written so far is kept" in errors
    wait_gone(children)
    assert segments_in(out) == ["c.partial/segments/000000/000000.json"]
    preprocess(large_corpus, out / "c", "sentencepiece", sp_model, workers=3 - workers)
    assert files_in(out) == large_result


def _asked_to_stop_while_importing(*_: object) -> None:
    """As an engine's first call: it imports, and takes whatever is raised meanwhile for a package that is not there."""
    with suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigpending()  # back in Python: the handler runs


def test_a_signal_in_the_first_call_of_an_engine_is_not_lost(
    tmp_path: Path, sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["text"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(SentencePieceTokenizer, "verify_on", _asked_to_stop_while_importing)
        preprocess([str(tmp_path / "x.jsonl")], tmp_path / "out" / "c", "sentencepiece", sp_model)
    assert stopped.value.code == 143
    assert preprocess([str(tmp_path / "x.jsonl")], tmp_path / "out" / "c", "sentencepiece", sp_model).documents == 1
    tokenizer = SimpleNamespace(encode_flat=_asked_to_stop_while_importing)
    worker = SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer), encode=mock.Mock())
    with pytest.raises(SystemExit) as stopped:  # a worker of Slurm or Ray
        EncodeUnits.work_on(cast(EncodeUnits, worker), [0])
    assert stopped.value.code == 143 and not worker.encode.called


@pytest.mark.slow
def test_two_jobs_on_one_prefix(tmp_path: Path, sp_model: Path, large_corpus: list[str]) -> None:
    out = tmp_path / "out"
    job = start_job(large_corpus, out / "c", sp_model, hold=str(tmp_path / "hold"))
    wait_for(job, tmp_path / "hold")
    second = start_job(large_corpus, out / "c", sp_model, overwrite=True)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2 and "another job is writing to" in errors
    let_go(tmp_path / "hold")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors


_MEASURED = """
import resource, sys
from steel_megatron.config import PreprocessConfig
from steel_megatron.data.preprocessing.pipeline import preprocess

if __name__ == "__main__":
    inputs, prefix, tokenizer, engine = sys.argv[1:]
    job = {"inputs": [inputs], "output_prefix": prefix, "tokenizer_path": tokenizer}
    preprocess(PreprocessConfig(**job, workers=2, engine=engine))
    print(*(resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tokenizers", "auto"])
def test_one_long_line_takes_a_few_times_its_size(tmp_path: Path, hf_folder: Path, engine: str) -> None:
    # 16 MB at once took the library 1.6 GB; what is compared with is a corpus of the same size in many lines.
    texts = make_texts(1000)
    megabytes = 16
    text = "".join(text + "\n" for text in texts)
    rows = text * (megabytes * 1_000_000 // len(text.encode()))
    write_jsonl(tmp_path / "one.jsonl", [rows])
    write_jsonl(tmp_path / "many.jsonl", rows.split("\n\n"))
    peaks = {}
    for name in ("one", "many"):
        command = [
            sys.executable,
            "-c",
            _MEASURED,
            f"{tmp_path}/{name}.jsonl",
            f"{tmp_path}/out/{name}",
            str(hf_folder),
            engine,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[name] = [int(figure) for figure in done.stdout.split()]
    for one, many in zip(peaks["one"], peaks["many"], strict=True):
        assert one - many < 20 * megabytes, peaks
