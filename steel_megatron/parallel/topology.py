"""From degrees to process groups. The only importer of megatron-core's parallel_state."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from steel_megatron.config import ParallelConfig
from steel_megatron.errors import ConfigError
from steel_megatron.platform import prepare

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

TIMEOUT = datetime.timedelta(minutes=float(os.environ.get("STEEL_DISTRIBUTED_TIMEOUT_MINUTES", "10")))


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: its number among all processes.
        world_size: number of processes.
        local_rank: its number on this machine.
        origin: who said so: ``torchrun``, ``slurm`` or ``alone``.
    """

    rank: int
    world_size: int
    local_rank: int
    origin: str


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Rank and size from torchrun's variables, else Slurm's (inside srun), else one process alone.

    Raises:
        ConfigError: a variable is there but is not a number, or they contradict each other.
    """
    for origin, rank, size, local in (
        ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        # Inside an sbatch script, but outside srun, Slurm sets NTASKS and PROCID = 0: only a step has a STEP_ID.
        if origin == "slurm" and "SLURM_STEP_ID" not in environment:
            continue
        if rank in environment and size in environment:
            try:
                own, count, place = int(environment[rank]), int(environment[size]), int(environment.get(local, "0"))
            except ValueError as error:
                raise ConfigError(f"{rank}, {size} and {local} of the environment must be numbers: {error}") from None
            if not 0 <= own < count:
                raise ConfigError(f"{rank}={own} of the environment is not below {size}={count}")
            return Launch(own, count, place, origin)
    return Launch(0, 1, 0, "alone")


def _rendezvous(launch: Launch) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher has not."""
    if launch.origin == "slurm":
        # The first node of the step's list; srun starts processes, but gives them no meeting point.
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "localhost"))
        os.environ.setdefault("MASTER_ADDR", first_host(nodes))
        job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))
    elif launch.origin == "alone":
        os.environ["MASTER_ADDR"] = "localhost"
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-07,9],login1`` gives ``gpu03``."""
    head, bracket, tail = node_list.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside, _, suffix = tail.partition("]")
    first = inside.split(",")[0].split("-")[0]
    return head + first + suffix.split(",")[0]


def initialize(parallel: ParallelConfig) -> Topology:
    """Join the launch and build the process groups.

    Raises:
        ConfigError: the number of processes does not fit the degrees.
    """
    launch = read_launch(os.environ)
    parallel.data_parallel_size(launch.world_size)  # checks, before anything is started
    platform = prepare()
    if not dist.is_initialized():
        _rendezvous(launch)
        dist.init_process_group(platform.backend, rank=launch.rank, world_size=launch.world_size, timeout=TIMEOUT)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=max(1, int(TIMEOUT.total_seconds() // 60)),
    )
    return Topology(parallel=parallel, launch=launch, device=platform.device)


def shutdown() -> None:
    """Leave the process groups."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


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
    def is_first_process(self) -> bool:
        """Whether this is rank 0 of the launch, which speaks and writes for all."""
        return self.launch.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_first_stage()

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer and sees the loss."""
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_last_stage()

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this process's pipeline."""
        from megatron.core import parallel_state

        return parallel_state.get_pipeline_model_parallel_last_rank()

    def describe(self) -> str:
        """The layout in one word, such as ``TP2 PP1 EP1 DP1``."""
        return self.parallel.describe(self.launch.world_size)
