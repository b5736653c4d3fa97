"""What one layout saves and another one loads, in launched processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from steel_megatron.config import RunConfig
from tests.hf.launched import Pieces
from tests.layouts.following import weights_of
from tests.train.small_run import own_batches

SAVED = 3
"""The step after which a checkpoint is saved."""
LAST = 5
"""The last one, after loading."""


@dataclass
class State:
    """What a process holds.

    Attributes:
        weights: its parts of the weights.
        optimizer: its parts of the running means, and of the float32 weights where there are copies.
        steps: the optimizer's steps so far, of each parameter.
        losses: losses and gradient norms of the steps that it did.
    """

    weights: Pieces
    optimizer: Pieces
    steps: set[int]
    losses: list[tuple[float, float]] = field(default_factory=list)


def save_and_train(run: RunConfig) -> State:
    """Train, save, and train on; what was held when it was saved, and the steps after that."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint_save
    from steel_megatron.train.engine import Engine

    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    for step in range(1, SAVED + 1):
        engine.step(own_batches(run, step, topology))
    state = state_of(engine)
    checkpoint_save.save(engine, SAVED * run.training.global_batch_size)
    return trained_on(state, engine)


def load_and_train(run: RunConfig) -> State:
    """Load, and train on; what was held before that, and the steps."""
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train import checkpoint
    from steel_megatron.train.engine import Engine

    engine = Engine(run, initialize(run.parallel))
    info = checkpoint.newest(run.checkpoints_dir)
    assert info is not None and info.step == SAVED
    checkpoint.load(engine, info)
    return trained_on(state_of(engine), engine)


def trained_on(state: State, engine: Any) -> State:
    for step in range(SAVED + 1, LAST + 1):
        done = engine.step(own_batches(engine.run, step, engine.topology))
        assert done.step == step
        state.losses.append((done.loss, done.grad_norm))
    return state


def state_of(engine: Any) -> State:
    """What this process holds now."""
    from steel_megatron.model.weights import sharded_weights
    from steel_megatron.train.optimizer_state import OptimizerState, optimizers_of

    optimizer = OptimizerState(engine.optimizer, sharded_weights(*engine.chunks))
    held = {
        f"{one.key}|{','.join(map(str, one.global_offset))}|0": one.data.clone() for one in optimizer.sharded.values()
    }
    values = [value for part in optimizers_of(engine.optimizer) for value in part.optimizer.state.values()]
    steps = {int(value["step"]) for value in values}
    return State(weights_of(engine), held, steps)
