"""Where and how wide a job of many tasks runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steel_megatron.config.checks import at_least, one_of, typed
from steel_megatron.errors import ConfigError

ExecutorName = Literal["local", "slurm", "ray"]


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Where and how wide a job runs; what it writes does not depend on it."""

    executor: ExecutorName = "local"
    """Where the tasks run."""
    workers: int = 1
    """Tasks that run at the same time."""
    tasks: int | None = None
    """Tasks per step; default: one per unit of input."""
    slurm_partition: str | None = None
    """Slurm partition."""
    slurm_time: str = "24:00:00"
    """Time limit per Slurm task."""
    slurm_memory_gb: int = 4
    """Memory per Slurm task, in GB; the comparison of documents requests more if it needs it."""
    slurm_qos: str | None = None
    """Slurm quality of service; default: the cluster's."""
    slurm_setup: str | None = None
    """Shell command that sets up the environment on a node; default: call this Python by its path."""
    slurm_poll_seconds: float = 30.0
    """Seconds between two queries of Slurm's job states."""

    def __post_init__(self) -> None:
        typed(self)
        one_of(get_args(ExecutorName), self, "executor")
        at_least(1, self, "workers", "tasks", "slurm_memory_gb")
        at_least(0, self, "slurm_poll_seconds")
        if self.executor == "slurm" and self.slurm_partition is None:
            raise ConfigError(f"{type(self).__name__}.slurm_partition is not set; executor slurm needs a partition")
