"""What launched processes do for the tests of fully sharded data parallelism and of what is overlapped."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steel_megatron.config import RunConfig
from tests.hf.launched import Pieces
from tests.train.engine_runs import weights_of
from tests.train.small_run import Trained, gradient_squares, own_batches

NAN_STEP = 2
"""The step that goes wrong in a run that may skip one."""


@dataclass
class Outcome:
    """What one process saw of a run: a :class:`Trained` of each step and an evaluation, its weights, its memory."""

    steps: list[Any]
    weights: Pieces
    live_bytes: int
    skipped: list[str | None]


def train_all(runs: Mapping[str, RunConfig], small_buckets: bool = False) -> dict[str, Outcome]:
    """Train several runs of one number of processes, one after the other.

    Args:
        runs: by name.
        small_buckets: whether gradients and weights are sent in many buckets, though the model is small.
    """
    from steel_megatron.platform import prepare

    prepare()
    if small_buckets:
        from megatron.core.distributed import DistributedDataParallelConfig

        plain = DistributedDataParallelConfig.__init__

        def with_small_buckets(self: Any, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, bucket_size=3000, **kwargs)

        DistributedDataParallelConfig.__init__ = with_small_buckets  # type: ignore[method-assign]
    return {name: _train(run) for name, run in runs.items()}


def _train(run: RunConfig) -> Outcome:
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine, minimised

    before = _live_bytes()
    engine = Engine(run, topology)
    steps: list[Any] = []
    skipped: list[str | None] = []
    for step in range(1, run.training.train_steps + 1):
        batches = own_batches(run, step, topology)
        if run.training.skip_non_finite_steps and step == NAN_STEP:
            weights = weights_of(engine)
            with _losses_that_are_no_numbers(engine.objective):
                skipped.append(engine.step(batches).skipped)
            assert all(torch.equal(weights[name], now) for name, now in weights_of(engine).items())
            continue
        result = engine.step(batches)
        skipped.append(result.skipped)
        if run.parallel.overlap_param_gather:
            assert _under_way(engine) and engine.chunks and not _under_way(engine)
        steps.append(Trained(result.loss, result.grad_norm, gradient_squares(engine)))
    live_bytes = _live_bytes() - before
    steps.append(tuple(minimised(engine.evaluate(own_batches(run, 0, topology)))))
    return Outcome(steps, weights_of(engine), live_bytes, skipped)


def _under_way(engine: Any) -> bool:
    """Whether weights are on their way from other processes."""
    groups = (group for one in engine.models for group in (*one.bucket_groups, *one.expert_parallel_bucket_groups))
    return any(group.param_gather_handle is not None for group in groups)


@contextmanager
def _losses_that_are_no_numbers(objective: Any) -> Iterator[None]:
    plain = objective.token_losses
    objective.token_losses = lambda logits, labels: plain(logits, labels) * float("nan")
    yield
    objective.token_losses = plain


def _live_bytes() -> int:
    """Bytes of all tensors' memory in this process."""
    gc.collect()
    storages = (one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def save_after_training(run: RunConfig) -> None:
    """Train as the run says, and save."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.engine import Engine

    engine = Engine(run, topology)
    for step in range(1, run.training.train_steps + 1):
        engine.step(own_batches(run, step, topology))
    checkpoint_save.save(engine, 8 * engine.step_number)


def pass_on(runs: list[tuple[RunConfig, str]]) -> None:
    """Load checkpoints under other layouts, and save them again at once.

    Args:
        runs: each with the folder of the run whose checkpoint it loads.
    """
    from steel_megatron.parallel.topology import initialize

    for run, source in runs:
        topology = initialize(run.parallel)
        from steel_megatron.train import checkpoint, checkpoint_save
        from steel_megatron.train.engine import Engine

        engine = Engine(run, topology)
        info = checkpoint.newest(Path(source) / "checkpoints")
        assert info is not None
        checkpoint.load(engine, info)
        checkpoint_save.save(engine, info.consumed_samples)


def read_all(folders: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of the newest checkpoints of runs, but for random states."""
    from steel_megatron.parallel.topology import alone

    found = {}
    with alone("a test"):
        from steel_megatron.train import checkpoint

        for folder in folders:
            info = checkpoint.newest(Path(folder) / "checkpoints")
            assert info is not None
            names = [name for name in checkpoint.tensor_names(info) if not name.startswith("random.")]
            found[folder] = checkpoint.read_tensors(info, names)
    return found


def interrupted(run: RunConfig, steps: int) -> tuple[list[float], list[float], list[str], tuple[float, ...]]:
    """Train without a stop; then again with a save and a load halfway.

    Returns:
        the losses of both, the names of weights and optimizer state that end differently, and the state of the loss
        scale halfway.
    """
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.engine import Engine

    def train(engine: Engine, first: int, last: int) -> list[float]:
        return [engine.step(own_batches(run, step, topology)).loss for step in range(first, last + 1)]

    straight, half = Engine(run, topology), Engine(run, topology)
    losses = train(straight, 1, steps)
    resumed = train(half, 1, steps // 2)
    state = half.bad_steps.history.loss_scale
    info = checkpoint.read_info(checkpoint_save.save(half, 8 * half.step_number))
    again = Engine(run, topology)
    checkpoint.load(again, info)
    assert again.bad_steps.history == half.bad_steps.history
    resumed += train(again, steps // 2 + 1, steps)
    one, two = ({**state["model"], **state["optimizer"]} for state in map(checkpoint.sharded_engine, (straight, again)))
    assert one.keys() == two.keys()
    return losses, resumed, [name for name in one if not torch.equal(one[name].data, two[name].data)], state
