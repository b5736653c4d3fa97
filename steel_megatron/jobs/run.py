"""Runs a step of a job to its end: by processes of this machine, or over Slurm or Ray (cluster.py)."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from steel_megatron.config import ExecutionConfig
from steel_megatron.errors import DataError
from steel_megatron.jobs import step as in_process
from steel_megatron.jobs.step import JobStep
from steel_megatron.log import progress

_SECONDS_BETWEEN_COUNTS = 0.5


def run_step(step: JobStep, execution: ExecutionConfig) -> None:
    """Run a step to its end; units that an earlier call completed are not done again.

    Raises:
        DataError: the executor is not available, or a task failed; the message is that of the first one.
    """
    tasks = min(execution.tasks or step.count, step.count)
    if not step.missing():
        return
    if execution.executor == "local":
        step.forget_failures()
        _run_here(step, tasks, execution.workers)
    else:
        from steel_megatron.jobs.cluster import run_on_cluster

        run_on_cluster(step, execution, tasks)
    if missing := step.missing():
        step.raise_first_failure()
        raise DataError(
            f"{len(missing)} of {step.count} units of the step {step.name} were not done; the logs are in {step.logs}; "
            "run the same command again to resume"
        )


def _run_here(step: JobStep, tasks: int, workers: int) -> None:
    ranks = [rank for rank in range(tasks) if step.missing(rank, tasks)]
    size = step.bytes_to_read()
    with progress(step.name, *((len(ranks), "tasks") if size is None else (size, "bytes"))) as shown:
        if min(workers, len(ranks)) == 1:
            with in_process.counted_by(in_process.nobody if size is None else shown.advance):
                for rank in ranks:
                    step(rank=rank, world_size=tasks)
                    shown.advance(1 if size is None else 0)
            return
        # The server imports once; what it forks has no threads yet.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(step).__module__])
        read = context.RawArray("d", len(ranks))  # one slot for each task: none is locked when a process is killed
        with ProcessPoolExecutor(
            min(workers, len(ranks)), mp_context=context, initializer=_begin, initargs=(read,)
        ) as pool:
            try:
                left, reported = (
                    {pool.submit(_run_task, step, slot, rank, tasks) for slot, rank in enumerate(ranks)},
                    0.0,
                )
                while left:
                    done, left = wait(left, _SECONDS_BETWEEN_COUNTS, FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    counted = len(ranks) - len(left) if size is None else sum(read)
                    shown.advance(counted - reported)
                    reported = counted
            except BrokenProcessPool:
                raise DataError(
                    "a worker process was killed, perhaps for want of memory; run the same command again to resume, "
                    "with fewer workers if memory is short"
                ) from None
            except BaseException:
                for worker in list((pool._processes or {}).values()):
                    worker.terminate()  # the pool would wait until their tasks are done
                raise
            finally:
                pool.shutdown(cancel_futures=True)


_read: Any = None
"""In a worker process: bytes that each task of the step has read."""


def _begin(read: Any) -> None:
    global _read
    _read = read
    end_with_parent()


def _run_task(step: JobStep, slot: int, rank: int, tasks: int) -> None:
    def add(size: float) -> None:
        _read[slot] += size

    in_process.on_bytes = add
    step(rank=rank, world_size=tasks)


def end_with_parent() -> None:
    """End this worker process when its parent was killed; it would wait for work forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
