"""Which Slurm jobs work on a job's folder, asked in a way that outlives the process that submitted them.

Their names end in a random token that is in the job's folder before the first of them is submitted. So a job that is
started again finds those that still run: also when it was killed while it submitted them, and all of them when Slurm's
limits split a step into several.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterable
from pathlib import Path

from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically

_FILE = "slurm"


def slurm_name(folder: Path, job: str, step: str) -> str:
    """The name of the Slurm jobs of a step.

    Args:
        folder: the job's folder.
        job: name of the kind of job, such as ``clean``.
        step: name of the step.

    Raises:
        DataError: the job's folder cannot be written.
    """
    path = folder / _FILE
    if not path.exists():
        write_atomically(path, secrets.token_hex(6).encode(), DataError)
    return f"{job}-{step}-{path.read_text()}"


def was_submitted(folder: Path) -> bool:
    """Whether Slurm may have jobs that work on a folder, now or later."""
    return (folder / _FILE).exists()


def live_jobs(folder: Path, job: str, steps: Iterable[str]) -> list[str]:
    """The ids of the Slurm jobs that run steps of a job, or wait to.

    Args:
        folder: the job's folder.
        job: name of the kind of job.
        steps: names of the steps.

    Raises:
        DataError: the job was run over Slurm, and Slurm does not answer.
    """
    if not was_submitted(folder):
        return []
    names = ",".join(slurm_name(folder, job, step) for step in steps)
    words = ["squeue", "--noheader", "--format=%A", f"--name={names}"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(
            f"{folder} was worked on over Slurm, and squeue, which would say whether jobs still run there, is not on "
            f"this machine; where you know that none does, remove {folder / _FILE}"
        ) from None
    if listed.returncode != 0:
        raise DataError(f"Slurm does not say whether jobs work on {folder}: {listed.stderr.strip()}")
    return sorted(set(listed.stdout.split()))
