"""A run and its ledger: the same samples under any layout, data appended between stops, a past that stays."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steel_megatron.cli import main
from steel_megatron.config import DataConfig, RunConfig
from steel_megatron.data.indexed_writer import IndexedWriter
from steel_megatron.data.ledger import Ledger
from tests.distributed import run_distributed
from tests.train.test_loop import losses, make_run, one

LENGTH = 24
SAMPLES = 20
"""Of each corpus; a step takes 8."""


def write(prefix: Path, first: int) -> str:
    """Tokens of ``first`` to ``first + 29`` only, so that a sample tells which corpus it is from."""
    random = np.random.default_rng(first)
    with IndexedWriter(prefix, np.uint16) as writer:
        for size in [48] * (SAMPLES // 2) + [1]:
            writer.add_document(first + random.integers(0, 30, size))
        writer.finalize({})
    return str(prefix)


def read(run: RunConfig, first_step: int, last_step: int) -> list[list[list[list[int]]]]:
    """The micro batches of this process in some steps, as tokens with the last label."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.batches import Batches

    batches, size = Batches(run, topology), run.training.global_batch_size
    batches.begin((first_step - 1) * size)
    found = []
    for step in range(first_step, last_step + 1):
        micro = batches.training((step - 1) * size)
        found.append([np.concatenate([one.tokens, one.labels[:, -1:]], axis=1).tolist() for one in micro])
    return found


def global_batches(by_rank: list[Any]) -> list[list[list[int]]]:
    """The samples of each step in their order, from what data-parallel processes read."""
    steps = []
    for of_ranks in zip(*by_rank, strict=True):
        steps.append([sample for micro in zip(*of_ranks, strict=True) for share in micro for sample in share])
    return steps


def test_the_same_samples_for_any_number_of_processes_and_workers(tmp_path: Path) -> None:
    data = DataConfig(train=[write(tmp_path / "a", 0), write(tmp_path / "b", 30)])
    alone = global_batches(run_distributed(read, 1, make_run(data, tmp_path / "1"), 1, 6))
    for name, processes, workers in (("dp2", 2, 0), ("dp4", 4, 0), ("workers", 1, 2)):
        run = make_run(dataclasses.replace(data, num_workers=workers), tmp_path / name)
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, micro_batch_size=2))
        assert global_batches(run_distributed(read, processes, run, 1, 6)) == alone, name
    later = make_run(data, tmp_path / "1")
    assert global_batches(run_distributed(read, 1, later, 4, 6)) == alone[3:]
    seen = Counter(tuple(sample) for step in alone[:5] for sample in step)  # 40 samples are one epoch of both
    assert set(seen.values()) == {1} and len(seen) == 2 * SAMPLES


def test_data_is_appended_between_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    first, second = write(tmp_path / "a", 0), write(tmp_path / "b", 30)
    run = make_run(DataConfig(train=[first]), folder, train_steps=5, stop_after_step=1)
    assert one(run).step == 1
    ledger = folder / "ledger.json"
    assert main(["data", "reweight", str(ledger), "a", "--epochs", "1"]) == 0
    assert main(["data", "append", str(ledger), second]) == 0
    assert "from where the run resumes: add b (1 times)" in capsys.readouterr().out
    assert main(["data", "append", str(ledger), second]) == 2
    assert "is in the ledger already, as b" in capsys.readouterr().err
    rest = dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))
    summary = one(rest)
    assert summary.finished and [step for step, _ in losses(rest)] == [1, 2, 3, 4, 5]
    settled = Ledger.load(ledger)
    assert [event.at for event in settled.events] == [0, 8, 8] and settled.capacity() == 2 * SAMPLES
    assert json.loads((summary.checkpoint / "ledger.json").read_text()) == json.loads(ledger.read_text())
    assert main(["data", "show", str(ledger), "--step", "1", "--json_output", "true"]) == 0
    before = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    after = []
    for step in range(2, 6):
        assert main(["data", "show", str(ledger), "--step", str(step), "--json_output", "true"]) == 0
        after += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {part["corpus"] for part in before} == {"a"}
    count = Counter(part["corpus"] for part in {part["sample"]: part for part in after}.values())
    assert count == {"a": SAMPLES - 8, "b": SAMPLES}  # everything unseen of both, once
    assert main(["data", "show", str(ledger)]) == 0
    assert "samples in all: 40" in capsys.readouterr().out


def test_too_little_data_is_refused_before_the_first_step(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / "ledger.json"
    words = ["data", "create", str(ledger), write(tmp_path / "a", 0), "--sequence_length", str(LENGTH), "--epochs", "2"]
    assert main(words) == 0
    message = one(make_run(DataConfig(), tmp_path / "run", train_steps=6))
    assert "training.train_steps x training.global_batch_size" in message and "48" in message and "40" in message
    assert one(make_run(DataConfig(), tmp_path / "run", train_steps=5)).finished


def test_a_past_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = make_run(DataConfig(train=[write(tmp_path / "a", 0)]), tmp_path / "run", train_steps=4, stop_after_step=2)
    assert one(run).step == 2
    ledger = tmp_path / "run" / "ledger.json"
    content = json.loads(ledger.read_text())
    ledger.write_text(json.dumps({**content, "seed": content["seed"] + 1}))
    message = one(run)
    assert "trained on other data than" in message and "step_00000002/ledger.json" in message
    ledger.unlink()
    assert "trained on other data than" in one(run)
    ledger.write_bytes((tmp_path / "run/checkpoints/step_00000002/ledger.json").read_bytes())
    assert one(dataclasses.replace(run, training=dataclasses.replace(run.training, stop_after_step=None))).finished


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["append", "nowhere.json", "x"], "nowhere.json"),
        (["mixture", "nowhere.json", "zh"], "weight 'zh' is not DOMAIN=WEIGHT"),
        (["mixture", "nowhere.json", "zh=-1"], "weight 'zh=-1' is not DOMAIN=WEIGHT"),
        (["show", "nowhere.json", "--step", "1"], "nowhere.json"),
        (["create", "l.json", "x", "--sequence_length", "8"], "x.idx"),
        (["remove", "nowhere.json"], "names"),
    ],
)
def test_bad_commands(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
