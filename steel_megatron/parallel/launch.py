"""How this process was started: its rank and the number of processes, from the environment alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from steel_megatron.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: its number among all processes.
        world_size: number of processes.
        local_rank: its number on this machine.
        origin: where this was read from: ``torchrun``, ``slurm`` or ``alone``.
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
    if "RANK" in environment and "WORLD_SIZE" in environment:
        origin, names = "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        # Inside an sbatch script, but outside srun, there is a PROCID too: only a step of srun has a STEP_ID. The job's
        # NTASKS may be another number than the step's.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        origin, names = "slurm", ("SLURM_PROCID", size, "SLURM_LOCALID")
    else:
        return Launch(0, 1, 0, "alone")
    rank, world_size, local_rank = (environment_number(environment, name) for name in names)
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank} of the environment is not below {names[1]}={world_size}")
    return Launch(rank, world_size, local_rank, origin)


def refuse_without_srun(environment: Mapping[str, str]) -> None:
    """Raise a ConfigError for a process of a Slurm job with several tasks that knows of no other one.

    Args:
        environment: variables of this process.
    """
    tasks = environment_number(environment, "SLURM_NTASKS")
    if read_launch(environment).origin == "alone" and tasks > 1:
        raise ConfigError(
            f"the Slurm job has {tasks} tasks (SLURM_NTASKS), but srun, which gives them their ranks, has not started "
            "this process; put srun before the command, or unset SLURM_NTASKS to train in this process alone"
        )


def environment_number(environment: Mapping[str, str], name: str) -> int:
    """A number of the environment, 0 where it has none of that name.

    Raises:
        ConfigError: it is no number.
    """
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} of the environment must be a number")
    return int(text)
