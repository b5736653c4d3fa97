"""Runs a step of a job over Slurm or Ray by datatrove's executors. Imports datatrove, so it is imported late.

datatrove marks tasks as complete; when the same step is run again with the same number of tasks, only the others run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from steel_megatron.config import ExecutionConfig
from steel_megatron.errors import DataError
from steel_megatron.jobs.slurm import live_jobs, slurm_name
from steel_megatron.jobs.step import JobStep
from steel_megatron.log import get_logger, progress

try:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
except ImportError as missing:
    raise DataError(
        f"executors other than local need the package datatrove ({missing}): pip install 'steel-megatron[data]'"
    ) from None

logger = get_logger(__name__)
_POLLS_WITHOUT_JOB = 3


class _Slurm(SlurmPipelineExecutor):
    """datatrove's Slurm executor without its job that sums up statistics: ours are in the markers."""

    def launch_merge_stats(self) -> None:
        pass


class _InFolder:
    """A step whose relative paths begin in the folder of this process: Ray's begin where their cluster was started."""

    def __init__(self, step: JobStep) -> None:
        self._step, self._folder = step, os.getcwd()

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        os.chdir(self._folder)
        self._step(data, rank, world_size)


def run_on_cluster(step: JobStep, execution: ExecutionConfig, tasks: int) -> None:
    """Run a step over Slurm or Ray, or wait for the Slurm job that an earlier call submitted.

    Args:
        step: the step.
        execution: where it runs.
        tasks: number of tasks.

    Raises:
        DataError: the executor is not available, or the first message of an earlier Slurm job's failed tasks.
    """
    live = _live_now(step, execution.slurm_poll_seconds) if execution.executor == "slurm" else []
    logs = step.logs / f"{step.name}-{tasks}"
    for rank in range(tasks):  # our markers decide, not datatrove's
        if step.missing(rank, tasks):
            (logs / "completions" / f"{rank:05d}").unlink(missing_ok=True)
    executor = _executor(step, execution, tasks, logs)
    if live:
        logger.info(f"{step.name}: waiting for the Slurm job {', '.join(live)}, which an earlier call submitted")
        _wait_for_slurm(executor, step, execution.slurm_poll_seconds)
        step.raise_first_failure()
    if executor.get_incomplete_ranks():
        step.forget_failures()
        if execution.executor == "slurm":
            _submit(executor, step.folder)
            _wait_for_slurm(executor, step, execution.slurm_poll_seconds)
        else:
            executor.run()


def _executor(step: JobStep, execution: ExecutionConfig, tasks: int, logs: Path) -> PipelineExecutor:
    common: dict[str, Any] = {"pipeline": [_InFolder(step)], "tasks": tasks, "logging_dir": os.path.abspath(logs)}
    if execution.executor == "slurm":
        return _Slurm(
            **common,
            workers=execution.workers,
            time=execution.slurm_time,
            partition=execution.slurm_partition,
            mem_per_cpu_gb=max(execution.slurm_memory_gb, math.ceil(step.memory() / (1 << 30))),
            qos=execution.slurm_qos,
            job_name=slurm_name(step.folder, step.job_name, step.name),
            env_command=execution.slurm_setup or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        )
    try:
        import ray
    except ImportError as error:
        raise DataError(f"executor ray needs the package ray ({error}): pip install 'steel-megatron[ray]'") from None
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            found = str(error).strip().splitlines()[0]
            raise DataError(f"executor ray cannot use Ray (RAY_ADDRESS names its cluster): {found}") from error
    return RayPipelineExecutor(**common, workers=execution.workers)


def _submit(executor: PipelineExecutor, folder: Path) -> None:
    try:
        executor.run()
    except FileNotFoundError as error:
        raise DataError(f"executor slurm needs Slurm's commands, and {error.filename} is not on this machine") from None
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"{error.cmd[0]} refused the job (exit code {error.returncode}); its script is below {folder}"
        ) from None


def _wait_for_slurm(executor: PipelineExecutor, step: JobStep, seconds: float) -> None:
    """Return when all tasks are complete, or Slurm no longer has the job."""
    absent = 0
    total = executor.world_size
    with progress(step.name, total=total, unit="tasks") as shown:
        done = 0
        while absent < _POLLS_WITHOUT_JOB:
            complete = total - len(executor.get_incomplete_ranks())
            shown.advance(complete - done)
            done = complete
            if complete == total:
                return
            time.sleep(seconds)
            try:
                absent = 0 if live_jobs(step.folder, step.job_name, [step.name]) else absent + 1
            except DataError as error:  # a controller that does not answer is no job that ended
                logger.warning(f"{error}; asking again in {seconds:g} s")


def _live_now(step: JobStep, seconds: float) -> list[str]:
    """The Slurm jobs of a step; a controller that does not answer is asked a few times."""
    for _ in range(_POLLS_WITHOUT_JOB):
        try:
            return live_jobs(step.folder, step.job_name, [step.name])
        except DataError as error:
            logger.warning(f"{error}; asking again in {seconds:g} s")
            time.sleep(seconds)
    return live_jobs(step.folder, step.job_name, [step.name])
