"""Runs a stage by datatrove: on this machine, over Slurm or over Ray. Imports datatrove, so it is imported late.

datatrove marks tasks as complete; when the same stage is run again with the same number of tasks, only the others run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from loguru import logger as datatrove_logger

from steel_megatron.config import ExecutionConfig
from steel_megatron.data.cleaning import job
from steel_megatron.data.cleaning.job import Stage
from steel_megatron.data.cleaning.slurm import job_name, live_jobs
from steel_megatron.errors import DataError
from steel_megatron.log import get_logger, progress

logger = get_logger(__name__)
_POLLS_WITHOUT_JOB = 3
_SECONDS_BETWEEN_COUNTS = 0.5


class _Local(LocalPipelineExecutor):
    """datatrove's local executor, on a pool that sees when a process is killed and that ends with its parent."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        workers = min(self.workers, len(ranks))
        stage: Stage = self.pipeline[0]
        size = stage.bytes_to_read()
        with progress(stage.name, *((len(ranks), "tasks") if size is None else (size, "bytes"))) as shown:
            if workers <= 1:
                job.on_bytes = job.nobody if size is None else shown.advance
                for rank in ranks:
                    _run_rank(self, rank)
                    shown.advance(1 if size is None else 0)
                return
            # The server imports once; what it forks has no threads yet.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            read = context.RawArray("d", len(ranks))  # a place for each task: none is locked when a process is killed
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(read,)) as pool:
                try:
                    left, told = {pool.submit(_run_counted, self, *task) for task in enumerate(ranks)}, 0.0
                    while left:
                        done, left = wait(left, _SECONDS_BETWEEN_COUNTS, FIRST_COMPLETED)
                        for task in done:
                            task.result()
                        counted = len(ranks) - len(left) if size is None else sum(read)
                        shown.advance(counted - told)
                        told = counted
                except BrokenProcessPool:
                    raise DataError(
                        "a process that cleaned was killed, perhaps for want of memory; run the same command again to "
                        "go on, with fewer workers if memory is short"
                    ) from None
                finally:
                    pool.shutdown(cancel_futures=True)


_read: Any = None
"""In a worker process: what each task of the stage has read, in bytes."""


def _begin(read: Any) -> None:
    """Begin a worker process, which ends with its parent."""
    global _read
    _read = read
    _end_with_parent()


def _run_counted(executor: PipelineExecutor, place: int, rank: int) -> None:
    def add(size: float) -> None:
        _read[place] += size

    job.on_bytes = add
    _run_rank(executor, rank)


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    # What went wrong is told once, by whoever started the job, without a traceback.
    datatrove_logger.disable("datatrove")
    executor._run_for_rank(rank)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Slurm(SlurmPipelineExecutor):
    """datatrove's Slurm executor without its job that sums up statistics: the funnel has them."""

    def launch_merge_stats(self) -> None:
        pass


def run_stage(stage: Stage, execution: ExecutionConfig) -> None:
    """Run a stage to its end; what an earlier call completed is not run again.

    Raises:
        DataError: the executor is not there, or a task failed; the message is that of the first one.
    """
    if stage.count == 0:
        return
    tasks = min(execution.tasks or stage.count, stage.count)
    folder = stage.job.folder
    live = _live_now(stage, execution.slurm_poll_seconds) if execution.executor == "slurm" else []
    executor = _executor(stage, execution, tasks, folder / "logs" / f"{stage.name}-{tasks}")
    missing = executor.get_incomplete_ranks()
    if not missing:
        return
    if live:
        logger.info(f"{stage.name}: waiting for the Slurm job {', '.join(live)}, which an earlier call submitted")
        _wait_for_slurm(executor, stage, execution.slurm_poll_seconds)
        _raise_first_failure(folder, stage.name)
    if executor.get_incomplete_ranks():
        for old in (folder / "failures").glob(f"{stage.name}-*.json"):
            old.unlink()
        _run(executor, stage, execution)
    missing = executor.get_incomplete_ranks()
    if missing:
        _raise_first_failure(folder, stage.name)
        raise DataError(
            f"{len(missing)} of {tasks} tasks of the stage {stage.name} did not complete; their logs are in "
            f"{folder / 'logs'}; run the same command again to go on"
        )


def _run(executor: PipelineExecutor, stage: Stage, execution: ExecutionConfig) -> None:
    if execution.executor == "slurm":
        _submit(executor, stage.job.folder)
        _wait_for_slurm(executor, stage, execution.slurm_poll_seconds)
    else:
        executor.run()


def _executor(stage: Stage, execution: ExecutionConfig, tasks: int, logs: Path) -> PipelineExecutor:
    common: dict[str, Any] = {"pipeline": [stage], "tasks": tasks, "logging_dir": str(logs)}
    if execution.executor == "local":
        return _Local(**common, workers=execution.workers)
    if execution.executor == "slurm":
        return _Slurm(
            **common,
            workers=execution.workers,
            time=execution.slurm_time,
            partition=execution.slurm_partition,
            mem_per_cpu_gb=max(execution.slurm_memory_gb, math.ceil(stage.memory() / (1 << 30))),
            qos=execution.slurm_qos,
            job_name=job_name(stage.job.folder, stage.name),
            env_command=execution.slurm_setup or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        )
    try:
        import ray
    except ImportError as error:
        raise DataError(f"executor ray needs the package ray ({error}): pip install 'steel-megatron[ray]'") from None
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
            try:
                absent = 0 if live_jobs(stage.job.folder, [stage.name]) else absent + 1
            except DataError as error:  # a controller that does not answer is no job that ended
                logger.warning(f"{error}; asking again in {seconds:g} s")


def _live_now(stage: Stage, seconds: float) -> list[str]:
    """The Slurm jobs of a stage; a controller that does not answer is asked a few times."""
    for _ in range(_POLLS_WITHOUT_JOB):
        try:
            return live_jobs(stage.job.folder, [stage.name])
        except DataError as error:
            logger.warning(f"{error}; asking again in {seconds:g} s")
            time.sleep(seconds)
    return live_jobs(stage.job.folder, [stage.name])


def _raise_first_failure(folder: Path, stage: str) -> None:
    for path in sorted((folder / "failures").glob(f"{stage}-*.json")):
        raise DataError(json.loads(path.read_bytes())["message"])
