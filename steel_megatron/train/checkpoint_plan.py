"""Whether a checkpoint loads under a layout, and what memory that takes, before a job is queued.

The engine of a rank is built as the job would build it, on tensors without memory, so the numbers are those of the job:
padding, the ranges of the distributed optimizer and whatever a later feature adds are in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from steel_megatron.config import RunConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.model.lora import is_adapter
from steel_megatron.model.weights import sharded_weights, storable
from steel_megatron.parallel.topology import simulated
from steel_megatron.train.checkpoint import sharded_engine, weight_files
from steel_megatron.train.checkpoint_info import CheckpointInfo, check_adapters, check_model
from steel_megatron.train.checkpoint_tensors import TensorFacts, TensorFiles
from steel_megatron.train.engine import Engine
from steel_megatron.train.optimizer_state import MAIN_WEIGHTS


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds all the time, in bytes.

    Attributes:
        rank: of the launch.
        weights: parameters and buffers of its part of the model.
        gradients: where they are accumulated.
        optimizer: the optimizer's state, with its own copies of weights.
    """

    rank: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """How a checkpoint loads under a layout.

    Attributes:
        info: the checkpoint.
        layout: the layout, such as ``TP2 PP1 EP1 DP1``.
        processes: of the launch.
        resumes: whether a run resumes from it; else it begins with its weights (checkpoint.init_from).
        keeps_random_states: whether each process gets the states of its random generators back.
        stages: the first rank of each pipeline stage, which holds the most of its stage, but for some counters.
    """

    info: CheckpointInfo
    layout: str
    processes: int
    resumes: bool
    keeps_random_states: bool
    stages: list[RankMemory]


def plan(info: CheckpointInfo, run: RunConfig, processes: int | None = None) -> Plan:
    """Find out how a checkpoint loads.

    Args:
        info: the checkpoint.
        run: the settings of the run that is to load it.
        processes: of its launch; None for as many as saved the checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another model, or lacks a tensor.
        ConfigError: the settings and the number of processes do not fit each other.
    """
    world_size = info.world_size if processes is None else processes
    check_layout_of(info, run, world_size)
    resumes, stages = _resumes(info, run), run.parallel.pipeline_model_parallel_size
    saved = (TensorFiles(info.path) if resumes else weight_files(info)).tensors
    found = []
    for rank in range(0, world_size, world_size // stages):
        with simulated_engine(run, rank, world_size) as engine:
            _check_tensors(info, saved, engine, resumes)
            found.append(memory_of(engine, rank))
    return Plan(
        info=info,
        layout=run.parallel.describe(world_size),
        processes=world_size,
        resumes=resumes,
        keeps_random_states=resumes and info.world_size == world_size,
        stages=found,
    )


def check_layout_of(info: CheckpointInfo, run: RunConfig, world_size: int) -> None:
    """Check what can be told from settings alone: model, degrees, batch.

    Args:
        info: the checkpoint.
        run: the settings of the run that is to load it.
        world_size: processes of its launch.

    Raises:
        CheckpointError: the checkpoint is of another model.
        ConfigError: the settings and the number of processes do not fit each other.
    """
    resumes = _resumes(info, run)
    check_model(info, run.model, resumes=resumes)
    if resumes:
        check_adapters(info, run.lora)
    run.num_micro_batches(world_size)


def _resumes(info: CheckpointInfo, run: RunConfig) -> bool:
    """Whether a run resumes from a checkpoint; else it starts from its weights."""
    return info.has_optimizer and (info.base is not None) == (run.lora.rank is not None)


@contextmanager
def simulated_engine(run: RunConfig, rank: int, world_size: int) -> Iterator[Engine]:
    """The engine that a rank of a run's launch has, without memory.

    Args:
        run: the run's settings.
        rank: of the launch.
        world_size: its processes.
    """
    # Weights have the same shapes in all implementations, and transformer-engine's modules want a real GPU.
    local = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, implementation="local"),
        training=dataclasses.replace(run.training, fp8=None),
    )
    with simulated(run.parallel, rank, world_size) as topology:
        yield Engine(local, topology)


def memory_of(engine: Engine, rank: int) -> RankMemory:
    """The bytes that an engine's tensors take; those that share memory count once.

    Args:
        engine: of a run, or simulated.
        rank: of its process.
    """
    parameters = [one.data for one in storable(sharded_weights(*engine.chunks)).values()]
    held = _Bytes()
    weights = held.add(parameters)
    gradients = held.add(getattr(one, "main_grad", None) for one in parameters)
    optimizer = 0
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = getattr(part, "optimizer", part)
        optimizer += held.add(one for group in inner.param_groups for one in group["params"])
        optimizer += held.add(one for values in inner.state.values() for one in values.values())
    return RankMemory(rank, weights, gradients, optimizer)


class _Bytes:
    """Counts memory that was not counted before."""

    def __init__(self) -> None:
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept, or another storage could get the same place

    def add(self, tensors: Iterable[Any]) -> int:
        """The bytes of the memory that these tensors lie in."""
        added = 0
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storage = local.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage
                added += storage.nbytes()
        return added


def _check_tensors(info: CheckpointInfo, saved: Mapping[str, TensorFacts], engine: Engine, resumes: bool) -> None:
    """Raise a CheckpointError for the first tensor of an engine that the checkpoint cannot fill."""
    if resumes:
        state = sharded_engine(engine)
        wanted: list[ShardedTensor] = [*state["model"].values(), *state["optimizer"].values()]
    else:
        wanted = [one for one in sharded_weights(*engine.chunks).values() if not is_adapter(one.key)]
    for one in wanted:
        name = one.key
        if name not in saved and name.startswith(MAIN_WEIGHTS):  # saved by a run in float32, which needs no copies
            name = name.removeprefix(MAIN_WEIGHTS)
        if name not in saved:
            raise CheckpointError(f"{info.path} has no tensor {name}, which this run needs")
        if saved[name].shape != tuple(one.global_shape):
            raise CheckpointError(
                f"{info.path} has {name} in the shape {list(saved[name].shape)}; this run needs "
                f"{list(one.global_shape)}"
            )
