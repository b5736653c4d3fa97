"""From degrees to process groups. The only importer of megatron-core's parallel_state."""

from __future__ import annotations

import datetime
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from steel_megatron.config import ParallelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.parallel.launch import Launch, environment_number, read_launch, refuse_without_srun
from steel_megatron.parallel.rendezvous import TIMEOUT, joining, meet
from steel_megatron.platform import prepare

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["Launch", "Topology", "alone", "first_host", "free_port", "initialize", "initialize_alone", "join"]
__all__ += ["read_launch", "refuse_without_srun", "shutdown", "simulated"]

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
PORTS = range(20000, 32000)
"""Below those that the kernel hands out: none of them becomes the near end of somebody's connection meanwhile."""

_BEFORE: dict[str, str | None] = {}
"""What was in the environment in place of what this process has set for itself, until :func:`shutdown`: processes that
are started later must not inherit that."""


def _timeout(environment: Mapping[str, str]) -> datetime.timedelta:
    """How long a process waits for the others."""
    return datetime.timedelta(minutes=environment_number(environment, TIMEOUT) or 30)


def _rendezvous(launch: Launch) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher has not.

    Raises:
        ConfigError: MASTER_ADDR is the machine itself, but the launch has several.
    """
    if launch.origin == "slurm":
        # The first node of the step's list; srun starts processes, but gives them no meeting point.
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "localhost"))
        found = {"MASTER_ADDR": first_host(nodes)}
        # Steps of jobs that share a node get different ports.
        number = environment_number(os.environ, "SLURM_JOB_ID") * 37 + environment_number(os.environ, "SLURM_STEP_ID")
        found["MASTER_PORT"] = str(PORTS[number % len(PORTS)])
        found = {name: value for name, value in found.items() if name not in os.environ}
        address, machines = os.environ.get("MASTER_ADDR", nodes), environment_number(os.environ, "SLURM_STEP_NUM_NODES")
        if machines > 1 and address in _THIS_MACHINE:
            raise ConfigError(
                f"MASTER_ADDR is {address}, which is another machine on each of the {machines} nodes of the step; "
                "unset it, and the step's first node is taken"
            )
    elif launch.origin == "alone":
        found = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    else:
        found = {}
    for name, value in found.items():
        _BEFORE.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def free_port() -> int:
    """A TCP port that nobody on this machine listens on, of :data:`PORTS`.

    Raises:
        ConfigError: a hundred of them are taken.
    """
    for _ in range(100):
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError(f"no free TCP port found from {PORTS[0]} to {PORTS[-1]} on this machine")


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-07,9],login1`` gives ``gpu03``."""
    head, bracket, tail = node_list.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside, _, suffix = tail.partition("]")
    first = inside.split(",")[0].split("-")[0]
    return head + first + suffix.split(",")[0]


def initialize(parallel: ParallelConfig, launch: Launch | None = None) -> Topology:
    """Join the launch and build the process groups.

    Args:
        parallel: the degrees.
        launch: this process's; None reads it from the environment.

    Raises:
        ConfigError: the number of processes does not fit the degrees.
        LostRankError: some processes did not come.
    """
    launch = launch or read_launch(os.environ)
    parallel.data_parallel_size(launch.world_size)  # checks, before anything is started
    platform = prepare()
    timeout = _timeout(os.environ)
    with joining():
        join(launch, platform.backend, timeout)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        parallel_state.destroy_model_parallel()
        get_cuda_rng_tracker().reset()  # names of an earlier run in this process, which others may not know
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline_model_parallel_size if parallel.interleaved else None
            ),
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_size,
            create_gloo_process_groups=True,
            distributed_timeout_minutes=int(timeout.total_seconds() // 60),
        )
    return Topology(parallel=parallel, launch=launch, device=platform.device)


def join(launch: Launch, backend: str, timeout: datetime.timedelta) -> None:
    """Make the group of all processes, unless there is one.

    Args:
        launch: this process's.
        backend: torch.distributed's.
        timeout: how long to wait for the others.

    Raises:
        LostRankError: some did not come.
    """
    if not dist.is_initialized():
        _rendezvous(launch)
        store = meet(launch.rank, launch.world_size, timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


def initialize_alone(task: str) -> Topology:
    """Process groups of one process, for what needs no more.

    Raises:
        ConfigError: the launch has several.
    """
    launch = read_launch(os.environ)
    if launch.world_size != 1:
        raise ConfigError(f"{task} runs in one process; this launch has {launch.world_size}")
    return initialize(ParallelConfig())


@contextmanager
def alone(task: str) -> Iterator[Topology]:
    """:func:`initialize_alone` for a block; the process is left as it was, without process groups if it had none.

    Raises:
        ConfigError: the launch has several processes.
    """
    there = dist.is_initialized()
    try:
        yield initialize_alone(task)
    finally:
        if not there:
            shutdown()


@contextmanager
def simulated(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[Topology]:
    """The place of a rank in a launch of ``world_size`` processes, in this process alone.

    What is built in the block has the shapes that it has on that rank, and no content.

    Args:
        parallel: the degrees.
        rank: of the process to stand for.
        world_size: processes of the launch.

    Raises:
        ConfigError: this process is one of several, or the number of processes does not fit the degrees.
    """
    from steel_megatron.platform.simulated import simulated_rank  # of torch's tools for tests, and slow to import

    own = read_launch(os.environ)
    if own.world_size != 1:
        raise ConfigError(f"a layout is planned in one process; this launch has {own.world_size}")
    prepare()
    with simulated_rank(rank, world_size):
        try:
            yield initialize(parallel, Launch(rank, world_size, 0, "simulated"))
        finally:
            shutdown()


def shutdown() -> None:
    """Leave the process groups."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    while _BEFORE:
        name, value = _BEFORE.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@dataclass(frozen=True)
class Topology:
    """The process groups of a run and this process's place in them.

    Attributes:
        parallel: the degrees.
        launch: rank and size of the whole launch.
        device: where this process's tensors live.
    """

    parallel: ParallelConfig
    launch: Launch
    device: torch.device

    @property
    def groups(self) -> ProcessGroupCollection:
        """megatron-core's ProcessGroupCollection of all groups."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        return ProcessGroupCollection.use_mpu_process_groups()

    @property
    def data_parallel_rank(self) -> int:
        """This process's number among those that read different samples."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        """Number of processes that read different samples."""
        return self.parallel.data_parallel_size(self.launch.world_size)

    @property
    def context_parallel_rank(self) -> int:
        """This process's number among those that read different chunks of the same samples."""
        from megatron.core import parallel_state

        return parallel_state.get_context_parallel_rank()

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0 of the launch, which logs and writes for all."""
        return self.launch.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding, in its first model chunk."""
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_first_stage()

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer and sees the loss, in its last model chunk."""
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_last_stage()

    def describe(self) -> str:
        """The layout in one word, such as ``TP2 SP PP1 CP2 EP1 DP1``."""
        return self.parallel.describe(self.launch.world_size)
