"""Runs a stage by datatrove: on this machine, over Slurm or over Ray. Imports datatrove, so it is imported late.

datatrove marks tasks as complete; when the same stage is run again with the same number of tasks, only the others run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from loguru import logger as datatrove_logger

from steel_megatron.data.cleaning.job import Stage
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.log import progress

ExecutorName = Literal["local", "slurm", "ray"]
_POLLS_WITHOUT_JOB = 3


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how wide a job runs."""

    executor: ExecutorName = "local"
    workers: int = 1
    """Tasks that run at the same time."""
    tasks: int | None = None
    """Tasks of a stage; one for each unit if None."""
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"
    slurm_memory_gb: int = 4
    """Memory of a task."""
    slurm_qos: str | None = None
    slurm_setup: str | None = None
    """Shell command that makes this Python's environment; its bin folder is put on the path if None."""
    slurm_poll_seconds: float = 30.0


class _Local(LocalPipelineExecutor):
    """datatrove's local executor, on a pool that sees when a process is killed and that ends with its parent."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        workers = min(self.workers, len(ranks))
        with progress(self.pipeline[0].name, total=len(ranks), unit="tasks") as shown:
            if workers <= 1:
                for rank in ranks:
                    _run_rank(self, rank)
                    shown.advance()
                return
            # The server imports once; what it forks has no threads yet.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
                try:
                    for done in as_completed([pool.submit(_run_rank, self, rank) for rank in ranks]):
                        done.result()
                        shown.advance()
                except BrokenProcessPool:
                    raise DataError(
                        "a process that cleaned was killed, perhaps for want of memory; run the same command again to "
                        "go on, with fewer workers if memory is short"
                    ) from None
                finally:
                    pool.shutdown(cancel_futures=True)


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    # What went wrong is told once, by whoever started the job, without a traceback.
    datatrove_logger.disable("datatrove")
    executor._run_for_rank(rank)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Slurm(SlurmPipelineExecutor):
    """datatrove's Slurm executor without its job that sums up statistics: the funnel has them."""

    def launch_merge_stats(self) -> None:
        pass


def run_stage(stage: Stage, execution: Execution) -> None:
    """Run a stage to its end; what an earlier call completed is not run again.

    Raises:
        ConfigError: the execution asks for something that is not there.
        DataError: a task failed; the message is that of the first one.
    """
    if stage.count == 0:
        return
    tasks = min(execution.tasks or stage.count, stage.count)
    folder = stage.job.folder
    for old in (folder / "failures").glob(f"{stage.name}-*.json"):
        old.unlink()
    executor = _executor(stage, execution, tasks, folder / "logs" / f"{stage.name}-{tasks}")
    missing = executor.get_incomplete_ranks()
    if not missing:
        return
    if execution.executor == "slurm":
        _submit(executor, folder)
        _wait_for_slurm(executor, stage, execution.slurm_poll_seconds)
    else:
        executor.run()
    missing = executor.get_incomplete_ranks()
    if missing:
        _raise_first_failure(folder, stage.name)
        raise DataError(
            f"{len(missing)} of {tasks} tasks of the stage {stage.name} did not complete; their logs are in "
            f"{folder / 'logs'}; run the same command again to go on"
        )


def _executor(stage: Stage, execution: Execution, tasks: int, logs: Path) -> PipelineExecutor:
    common: dict[str, Any] = {"pipeline": [stage], "tasks": tasks, "logging_dir": str(logs)}
    if execution.executor == "local":
        return _Local(**common, workers=execution.workers)
    if execution.executor == "slurm":
        if execution.slurm_partition is None:
            raise ConfigError("executor slurm needs a partition; name it with --slurm_partition")
        return _Slurm(
            **common,
            workers=execution.workers,
            time=execution.slurm_time,
            partition=execution.slurm_partition,
            mem_per_cpu_gb=execution.slurm_memory_gb,
            qos=execution.slurm_qos,
            job_name=f"clean-{stage.name}",
            env_command=execution.slurm_setup or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        )
    try:
        import ray
    except ImportError as error:
        raise DataError(f"executor ray needs the package ray ({error}): pip install 'ray[default]'") from None
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
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


def _wait_for_slurm(executor: PipelineExecutor, stage: Stage, seconds: float) -> None:
    """Return when all tasks are complete, or Slurm has the job no more."""
    absent = 0
    total = executor.world_size
    with progress(stage.name, total=total, unit="tasks") as shown:
        done = 0
        while absent < _POLLS_WITHOUT_JOB:
            complete = total - len(executor.get_incomplete_ranks())
            shown.advance(complete - done)
            done = complete
            if complete == total:
                return
            time.sleep(seconds)
            listed = subprocess.run(
                ["squeue", "--noheader", f"--jobs={executor.job_id}"], capture_output=True, text=True, check=False
            )
            # Of a job that ended long ago squeue says that its id is invalid.
            absent = 0 if listed.stdout.strip() else absent + 1


def _raise_first_failure(folder: Path, stage: str) -> None:
    for path in sorted((folder / "failures").glob(f"{stage}-*.json")):
        raise DataError(json.loads(path.read_bytes())["message"])
