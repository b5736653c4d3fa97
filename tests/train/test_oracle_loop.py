"""The loop on indexed corpora does what a plain trainer does that reads the corpora by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.config import CheckpointConfig, ParallelConfig, RunConfig
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.data.ledger.ledger import Ledger
from steel_megatron.data.ledger.loader import LedgerSamples
from tests.distributed import run_distributed
from tests.hf.test_convert import assemble
from tests.train.engine_runs import LoopRecord, through_the_loop, validation_batches
from tests.train.oracle import Oracle, Sample, movement_errors
from tests.train.test_oracle import FLOAT32, MODEL, make_case, one_thread

__all__ = ["one_thread"]
FIRST = 0
"""The id with which every document begins, and that is nowhere else."""
LENGTH = MODEL.sequence_length


def write(prefix: Path, tokens: int, seed: int) -> tuple[str, np.ndarray]:
    """A corpus of so many tokens, and the tokens; the later a document, the fewer different ones it has."""
    random, texts, left = np.random.default_rng(seed), [], tokens
    while left:
        size = min(int(random.integers(1, 15)), left)
        texts.append(np.append(FIRST, random.integers(1, 2 + MODEL.vocab_size * left // (tokens + 20), size - 1)))
        left -= size
    prefix.parent.mkdir(exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(text)
        writer.finalize({})
    return str(prefix), np.concatenate(texts)


def as_sample(tokens: np.ndarray, packed: bool) -> Sample:
    """No document says how the next one begins, where documents are packed."""
    begins = tuple((np.flatnonzero(tokens[1:] == FIRST) + 1).tolist()) if packed else ()
    counts = torch.ones(len(tokens) - 1, dtype=torch.bool)
    counts[[begin - 1 for begin in begins]] = False
    return Sample(torch.from_numpy(tokens.astype(np.int64)), counts, begins)


def make_run(
    folder: Path, packed: bool, validation: str, eval_steps: int, parallel: ParallelConfig, **model: Any
) -> RunConfig:
    run = make_case(3, packed=packed, parallel=parallel, optimizer={"warmup_steps": 1}, **model).run
    train, _ = write(folder / "train", 600, 1)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, train=[train], validation=[validation]),
        training=dataclasses.replace(run.training, eval_steps=eval_steps, eval_interval=2),
        checkpoint=CheckpointConfig(directory=str(folder / "run")),
    )


def trained_by_oracle(run: RunConfig, records: list[LoopRecord]) -> Oracle:
    """The oracle after the run's steps, on the samples that the ledger says; the run's steps were the same."""
    before = assemble([record.before for record in records], run.model)
    oracle, packed = Oracle(run, before), run.data.reset_at_eod
    stream, size = LedgerSamples(Ledger.load(run.ledger_path)), run.training.global_batch_size
    for number in range(run.training.train_steps):
        read = [stream.sample(place) for place in range(number * size, (number + 1) * size)]
        theirs = oracle.step([as_sample(tokens, packed) for tokens in read])
        for record in records:
            ours = record.steps[number]
            assert ours.loss == pytest.approx(theirs.loss, rel=FLOAT32.loss), number
            assert (ours.lr, ours.tokens) == (pytest.approx(theirs.lr), theirs.tokens), number
    after = assemble([record.after for record in records], run.model)
    errors = movement_errors(after, oracle.weights(), before)
    assert max(errors.values()) < FLOAT32.movement, errors
    return oracle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "processes", "packed", "eval_steps", "parallel"),
    [
        pytest.param(13, 2, False, 5, ParallelConfig(), id="13 of 13, dp2"),
        pytest.param(8, 1, True, 1, ParallelConfig(), id="8 of 13, packed"),
        pytest.param(13, 2, True, 2, ParallelConfig(expert_model_parallel_size=2), id="13 of 13, packed, ep2"),
    ],
)
def test_the_loop(
    count: int, processes: int, packed: bool, eval_steps: int, parallel: ParallelConfig, tmp_path: Path
) -> None:
    """Validation of the first ``count`` of 13 samples, after the last of three steps."""
    validation, flat = write(tmp_path / "valid", 13 * LENGTH + 5, 2)
    run = make_run(tmp_path, packed, validation, eval_steps, parallel)
    records = run_distributed(through_the_loop, processes, run)
    oracle = trained_by_oracle(run, records)
    expected = [as_sample(flat[n * LENGTH : (n + 1) * LENGTH + 1], packed) for n in range(count)]
    loss, labels = oracle.evaluate(expected)
    assert labels == sum(int(sample.counts.sum()) for sample in expected)
    assert (labels < count * LENGTH) == packed
    for record in records:
        assert record.summary.validation_loss == pytest.approx(loss, rel=FLOAT32.loss)


@pytest.mark.parametrize(
    "parallel",
    [pytest.param(ParallelConfig(), id="dp2"), pytest.param(ParallelConfig(tensor_model_parallel_size=2), id="tp2")],
)
def test_every_sample_of_a_validation_counts_once(parallel: ParallelConfig, tmp_path: Path) -> None:
    """As many micro batches on every process; what fills up the last ones does not count."""
    counts, runs, texts = (1, 3, 5, 13, 8), [], []
    for number, count in enumerate(counts):
        prefix, flat = write(tmp_path / str(count), count * LENGTH + 1 + number, count)
        runs.append(make_run(tmp_path / f"run of {count}", False, prefix, 2 - number % 2, parallel))
        texts.append([flat[n * LENGTH : (n + 1) * LENGTH].tolist() for n in range(count)])
    by_rank = run_distributed(validation_batches, 2, runs)
    readers = [by_rank] if parallel.tensor_model_parallel_size == 1 else [[batches] for batches in by_rank]
    for ranks in readers:
        for run, text, *of_run in zip(runs, texts, *ranks, strict=True):
            assert len({len(batches) for batches in of_run}) == 1
            assert {len(batch) for batches in of_run for batch in batches} == {run.training.micro_batch_size}
            counted = [row for micro in zip(*of_run, strict=True) for batch in micro for row, counts in batch if counts]
            assert counted == text[: run.training.eval_steps * run.training.global_batch_size]
