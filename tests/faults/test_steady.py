"""A long run needs no more of anything than a short one."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from steel_megatron.config import CheckpointConfig, DataConfig
from steel_megatron.train.callbacks import Callback, RunView
from steel_megatron.train.engine import StepResult
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.train.test_loop import make_run, write_corpus

STEPS, BETWEEN = 2000, 400


class Held(NamedTuple):
    """What a process holds."""

    bytes: int
    descriptors: int
    threads: int


class Meter(Callback):
    """Measures now and then, at the same distance from a save."""

    def __init__(self) -> None:
        self.found: list[Held] = []

    def after_step(self, run: RunView, result: StepResult) -> None:
        if result.step % BETWEEN == BETWEEN // 2:
            gc.collect()
            memory = psutil.Process().memory_info().rss
            self.found.append(Held(memory, len(os.listdir("/proc/self/fd")), threading.active_count()))


def train(data: DataConfig, folder: Path) -> list[Held]:
    """2,000 steps with five saves and validations."""
    run = make_run(data, folder, train_steps=STEPS, eval_interval=BETWEEN, log_interval=100)
    checkpoint = CheckpointConfig(directory=str(folder), save_interval=BETWEEN, keep_last=2)
    run = dataclasses.replace(run, checkpoint=checkpoint)
    meter = Meter()
    pretrain(run, callbacks=[meter])
    return meter.found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_steps_hold_no_more_than_the_first_hundreds(tmp_path: Path) -> None:
    train_set, valid_set = write_corpus(tmp_path / "train", 400, 0), write_corpus(tmp_path / "valid", 12, 1)
    data = DataConfig(train=[train_set], validation=[valid_set])
    (found,) = run_distributed(train, 1, data, tmp_path / "run")
    assert len(found) == STEPS // BETWEEN
    later = found[1:]  # behind the first save, whose memory is kept for the next ones
    assert all(held.threads == later[0].threads for held in later), later
    assert all(held.descriptors <= later[0].descriptors + 2 for held in later), later  # a file may be open just then
    assert max(held.bytes for held in later) - later[0].bytes < 8 << 20, later
