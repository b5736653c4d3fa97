"""Every parallel layout reads what one process reads; tests/layouts holds what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from steel_megatron.config import DataConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, small_run, train
from tests.train.test_loop import make_run, outcome, write_corpus


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", ["cp2", "tp2 sp"])
def test_a_run_reads_its_part_of_every_sample(layout: str, tmp_path: Path) -> None:
    """From indexed corpora to the validation loss, through the training loop."""
    data = DataConfig(
        train=[write_corpus(tmp_path / "train", 60, 0)], validation=[write_corpus(tmp_path / "valid", 12, 1)]
    )
    summaries = []
    for name, processes in (("alone", 1), (layout, PROCESSES[layout])):
        run = make_run(data, tmp_path / name, LAYOUTS.get(name, ParallelConfig()), train_steps=3)
        summaries.append(run_distributed(outcome, processes, run)[-1])
    theirs, ours = summaries
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-5)


def test_the_small_run_learns() -> None:
    steps = run_distributed(train, 1, small_run(ParallelConfig(), steps=10))[0]
    losses = [step.loss for step in steps[:10]]
    assert losses[-1] < losses[0] - 0.1
