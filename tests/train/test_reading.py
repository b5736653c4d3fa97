"""Data workers whose reading fails, or that die."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steel_megatron.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import DataError, TrainingError
from steel_megatron.train.reading import read_ahead

BAD, FATAL = 2, 3


class Stream:
    """Samples that are their own numbers; one cannot be read, one kills the process that reads it."""

    labelled = False

    def sample(self, number: int) -> np.ndarray:
        if number == BAD:
            raise DataError(f"sample {number} is damaged")
        if number == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full(9, number)


def read(first: int, end: int, workers: int) -> list[int]:
    run = RunConfig(
        model=ModelConfig(routing_mode="token", sequence_length=8),
        data=DataConfig(num_workers=workers),
        training=TrainingConfig(global_batch_size=1, micro_batch_size=1),
    )
    topology: Any = SimpleNamespace(data_parallel_rank=0, data_parallel_size=1)
    stream: Any = Stream()
    return [int(samples[0, 0]) for ((samples, *_),) in read_ahead(stream, run, topology, first, end)]


def test_a_sample_that_cannot_be_read() -> None:
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            read(0, BAD + 1, workers)
        assert str(caught.value) == "sample 2 is damaged"


def test_a_worker_that_is_killed() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(TrainingError) as caught:
        read(FATAL, FATAL + 1, 1)
    message = str(caught.value)
    assert " of data.num_workers = 1 was killed by SIGKILL; if memory ran out, lower data.num_workers" in message
    assert len(message.splitlines()) == 1 and signal.getsignal(signal.SIGCHLD) == before
