"""The wall-clock limit of a Slurm job, known without any signal: a run saves while there is time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping

from steel_megatron.log import get_logger

logger = get_logger(__name__)

UNKNOWN_SAVE_SECONDS = 300.0
"""What a save is taken for before one was measured, in a job with enough time; see :func:`reserve`."""
SAFETY_SECONDS = 20.0
"""For what comes after the save: the processes' end, and the batch script's decision."""


class TimeLimit:
    """Says when a run must stop to have its state on disk before the job's time is up.

    Args:
        end: when the job ends, in seconds since the epoch; None if it may run for ever, or nobody knows.
        now: the time now.
    """

    def __init__(self, end: float | None, now: float | None = None) -> None:
        self._end = end
        self._given = 0.0 if end is None else end - (time.time() if now is None else now)

    def is_up(self, step_seconds: float, save_seconds: float | None, now: float | None = None) -> bool:
        """Whether there is too little time for another step and a save.

        Args:
            step_seconds: the longest step so far.
            save_seconds: the longest save so far; None before the first.
            now: seconds since the epoch; None for the clock's.
        """
        if self._end is None:
            return False
        left = self._end - (time.time() if now is None else now)
        return left < reserve(step_seconds, save_seconds, self._given)


def reserve(step_seconds: float, save_seconds: float | None, given: float) -> float:
    """Seconds that must be left before another step is begun.

    Twice a step and twice a save, as both vary, and what comes after. As long as no save was measured, it is taken for
    five minutes, but for no more than a tenth of the time that the job had.

    Args:
        step_seconds: the longest step so far.
        save_seconds: the longest save so far; None before the first.
        given: seconds that the job had when the run began.
    """
    save = min(UNKNOWN_SAVE_SECONDS, given / 10) if save_seconds is None else 2 * save_seconds
    return 2 * step_seconds + save + min(SAFETY_SECONDS, given / 10)


def job_end(environment: Mapping[str, str]) -> float | None:
    """When this process's Slurm job reaches its time limit, in seconds since the epoch; None outside of a job.

    Slurm says so itself from version 23.02 on, and the library's batch scripts do for earlier ones. Otherwise squeue is
    asked, if it is here: a container may lack it.

    Args:
        environment: variables of this process.
    """
    said = environment.get("SLURM_JOB_END_TIME", "")
    if said.isdecimal() and int(said) > 0:
        return float(said)
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    words = ["squeue", "--noheader", f"--jobs={environment['SLURM_JOB_ID']}", "--format=%L"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    left = slurm_seconds(answer.strip())
    return None if left is None else time.time() + left


def slurm_seconds(text: str) -> float | None:
    """Seconds of a time as Slurm writes it: ``90``, ``30:00``, ``24:00:00``, ``2-12``, ``2-12:30``; None for no time.

    Args:
        text: minutes, minutes:seconds, hours:minutes:seconds, or these after days, as sbatch takes them.
    """
    days, dash, rest = text.strip().rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts) or (dash and not days.isdecimal()) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # hours first
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return int(days or 0) * 86400.0 + hours * 3600 + minutes * 60 + seconds
