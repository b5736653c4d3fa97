"""What is random goes on after a resume as if there had been no stop."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.train.callbacks import Callback, RunView
from steel_megatron.train.engine import StepResult
from steel_megatron.train.loop import pretrain
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS
from tests.train.test_loop import make_run, write_corpus


class Draws(Callback):
    """Draws from every generator around each step, as layers and objectives of a user's own may."""

    def __init__(self) -> None:
        self.drawn: list[tuple[Any, ...]] = []

    def before_step(self, run: RunView) -> None:
        self._draw()

    def after_step(self, run: RunView, result: StepResult) -> None:
        self._draw()

    def _draw(self) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        tracker, named = get_cuda_rng_tracker(), []
        for name in sorted(tracker.get_states()):
            with tracker.fork(name):
                named.append(torch.rand(3).tolist())
        # An odd number of normal numbers leaves one over, which is a part of the state.
        numbers = np.random.normal(), random.gauss(0, 1), np.random.randint(10**6), random.random()
        self.drawn.append((*numbers, torch.randn(3).tolist(), named))


def hashes(folders: list[Path]) -> list[dict[str, str]]:
    """Of all tensors of checkpoints."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint

    initialize(ParallelConfig())
    found = []
    for folder in folders:
        info = checkpoint.read_info(folder)
        tensors = checkpoint.read_tensors(info, checkpoint.tensor_names(info))
        found.append({key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()})
    return found


def drawn(run: RunConfig, seed: int) -> tuple[list[float], list[Any]]:
    """Losses and draws of a run, in a process in which others have drawn before."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    draws = Draws()
    return list(pretrain(run, [draws]).losses), draws.drawn


def with_dropout(data: DataConfig, folder: Path, parallel: ParallelConfig, **data_options: Any) -> RunConfig:
    run = make_run(dataclasses.replace(data, **data_options), folder, parallel)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, hidden_dropout=0.2, attention_dropout=0.1),
        checkpoint=dataclasses.replace(run.checkpoint, save_interval=2),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "processes", "workers"), [("alone", 1, 1), ("tp2 sp", 2, 0), ("pp2", 2, 0), ("cp2 ep2", 2, 0)]
)
def test_a_resume_changes_nothing(tmp_path: Path, layout: str, processes: int, workers: int) -> None:
    data = DataConfig(train=[write_corpus(tmp_path / "train", 60, 0)], validation=[write_corpus(tmp_path / "v", 12, 1)])
    parallel = ParallelConfig() if layout == "alone" else LAYOUTS[layout]
    straight, whole = (with_dropout(data, tmp_path / name, parallel, num_workers=workers) for name in ("a", "b"))
    half = dataclasses.replace(whole, training=dataclasses.replace(whole.training, stop_after_step=2))
    launches = [run_distributed(drawn, processes, run, seed) for seed, run in enumerate((straight, half, whole))]
    for rank, (losses, numbers) in enumerate(launches[0]):
        assert losses == launches[1][rank][0] + launches[2][rank][0] and len(losses) == 6, rank
        assert numbers == launches[1][rank][1] + launches[2][rank][1] and len({str(one) for one in numbers}) == 12
    ours, theirs = run_distributed(hashes, 1, [run.checkpoints_dir / "step_00000006" for run in (straight, whole)])[0]
    assert ours == theirs and {"random.torch", "random.numpy", "random.python"} <= ours.keys()
    assert ("random.megatron.model-parallel-rng" in ours) == (layout == "tp2 sp")
