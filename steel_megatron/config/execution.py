"""Where and how wide a job of many tasks runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steel_megatron.config.checks import at_least, one_of
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
    """Tasks of a stage; one for each unit of input if not given."""
    slurm_partition: str | None = None
    """Partition of the Slurm jobs."""
    slurm_time: str = "24:00:00"
    """Time limit of a Slurm task."""
    slurm_memory_gb: int = 4
    """Memory of a Slurm task; the comparison of documents gets more where it needs more."""
    slurm_qos: str | None = None
    """Quality of service of the Slurm jobs; the cluster's default if not given."""
    slurm_setup: str | None = None
    """Shell command that sets this environment up on a node; this Python is put on the path if not given."""
    slurm_poll_seconds: float = 30.0
    """How often Slurm is asked."""

    def __post_init__(self) -> None:
        one_of(get_args(ExecutorName), self, "executor")
        at_least(1, self, "workers", "tasks", "slurm_memory_gb")
        at_least(0, self, "slurm_poll_seconds")
        if self.executor == "slurm" and self.slurm_partition is None:
            raise ConfigError(f"{type(self).__name__}.slurm_partition is not set; executor slurm needs a partition")
