"""Which Slurm jobs work on a cleaning job, asked in a way that outlives the process that submitted them.

The Slurm jobs of a job have names that nothing else has; the part that makes them so is in the job's folder before the
first of them is submitted. So one that is started again finds those that live, also when it was killed while it
submitted, and all of them when Slurm's limits cut a stage into several.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterable
from pathlib import Path

from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically

_FILE = "slurm"


def job_name(folder: Path, stage: str) -> str:
    """The name of the Slurm jobs of a stage.

    Raises:
        DataError: the job's folder cannot be written.
    """
    path = folder / _FILE
    if not path.exists():
        write_atomically(path, secrets.token_hex(6).encode(), DataError)
    return f"clean-{stage}-{path.read_text()}"


def live_jobs(folder: Path, stages: Iterable[str]) -> list[str]:
    """The ids of the Slurm jobs that run stages of a job, or wait to.

    Raises:
        DataError: the job was run over Slurm, and Slurm does not say.
    """
    if not (folder / _FILE).exists():
        return []
    names = ",".join(job_name(folder, stage) for stage in stages)
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
