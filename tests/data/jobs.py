"""Preprocessing jobs in processes of their own, for tests that kill them; and their inputs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steel_megatron.data.native import helpers
from tests.data.conftest import make_texts, write_jsonl

_CODE = """
import json, sys, time
from pathlib import Path
from steel_megatron.data.preprocessing import workers as encoding_workers
from steel_megatron.config import PreprocessConfig
from steel_megatron.data.preprocessing.pipeline import preprocess
from steel_megatron.data.preprocessing.segments import SegmentWriter
from steel_megatron.data.preprocessing.step import ChunkSizes
from steel_megatron.log import exit_code

def stop_after(writes, reached, released):
    write, left = SegmentWriter.add, writes

    def counted(*task):
        nonlocal left
        left -= 1
        write(*task)
        if left == 0:
            reached.write_text("reached")
            while not released.exists():
                time.sleep(0.002)

    SegmentWriter.add = counted

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    pace = ChunkSizes(**arguments.pop("pace"))
    encoding_workers._BYTES_PER_WORKER = 1 << 16  # most of the work is yet to be handed out
    if "hold" in arguments:
        reached = Path(arguments.pop("hold"))
        stop_after(3, reached, reached.with_suffix(".go"))
    sys.exit(exit_code(lambda: preprocess(PreprocessConfig(**arguments), pace)))
"""

THREADS = find_spec("gigatoken") is not None and helpers is not None
"""Whether preprocess can encode by threads here."""

PACE = {"chunk_bytes": 4096, "segment_bytes": 1 << 14, "segment_seconds": 0.2}
"""Small steps, so that little data has many of them."""


def files_in(folder: Path) -> dict[str, bytes]:
    """Names below a folder and contents, without reports: those tell the time and the place.

    None when the folder is not there: work that wrote nothing leaves none.
    """
    found = sorted(folder.rglob("*")) if folder.exists() else []
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in found
        if path.is_file() and not path.match("*.report.json")
    }


def segments_in(folder: Path) -> list[str]:
    """Markers of the segments of an unfinished job ``c`` in a folder."""
    return [name for name in files_in(folder) if name.startswith("c.partial/segments/") and name.endswith(".json")]


def mixed_inputs(folder: Path, count: int) -> list[str]:
    """Three files of two formats and sources, with rows of every sort."""
    texts = make_texts(count)
    third = count // 3
    plain = write_jsonl(folder / "a.jsonl", texts[:third])
    plain.write_bytes(plain.read_bytes() + b'{"text": null}\n\nbroken\n')
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        rows = [*texts[third : 2 * third], "", *texts[2 * third :]]
        file.write("".join(json.dumps({"text": text}) + "\n" for text in rows).encode())
    turns = [{"kind": "QA", "input": f"question {number}?", "target": f"answer {number}"} for number in range(third)]
    (folder / "c.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in [*turns, {"kind": "QA"}]))
    return [str(plain), str(folder / "b.jsonl.gz"), f"firefly={folder}/c.jsonl"]


def start_job(inputs: list[str], prefix: Path, model: Path, **options: Any) -> subprocess.Popen[str]:
    """Start ``preprocess`` with SentencePiece, in small steps.

    Args:
        options: of ``preprocess``; and ``hold``, a file that appears when the job stands still, with a few tasks
            written and most of them yet to come. It goes on when :func:`let_go` is called.
    """
    arguments = {
        "inputs": inputs,
        "output_prefix": str(prefix),
        "tokenizer_kind": "sentencepiece",
        "tokenizer_path": str(model),
        "pace": PACE,
        **options,
    }
    return subprocess.Popen([sys.executable, "-c", _CODE, json.dumps(arguments)], stderr=subprocess.PIPE, text=True)


def wait_for(job: subprocess.Popen[str], path: Path, seconds: float = 60) -> None:
    """Wait until a file has content; the job must still be running then."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline and job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.002)


def let_go(hold: Path) -> None:
    """Let a job go on that stands still."""
    hold.with_suffix(".go").touch()


def workers_of(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of the job's spawned workers."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_gone(pids: list[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "workers outlived the job"
        time.sleep(0.02)
