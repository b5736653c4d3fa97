"""Runs a step of a job to its end: by processes of this machine, or over Slurm or Ray (cluster.py)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from steel_megatron.config import ExecutionConfig
from steel_megatron.errors import DataError
from steel_megatron.jobs import step as in_process
from steel_megatron.jobs.step import JobStep
from steel_megatron.log import progress

_SECONDS_BETWEEN_COUNTS = 0.5
SIGNAL_SECONDS = 0.3
"""A scheduler that ends a job sends SIGTERM to the workers too: time for our own, which says more than their end."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


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
        _run_in_pool(step, ranks, tasks, min(workers, len(ranks)), size, shown.advance)


def _run_in_pool(
    step: JobStep,
    ranks: Sequence[int],
    tasks: int,
    workers: int,
    size: int | None,
    advance: Callable[[float], None],
) -> None:
    """Do tasks of a step in worker processes.

    Args:
        step: the step.
        ranks: numbers of the tasks.
        tasks: number of all tasks of the step.
        workers: number of processes.
        size: bytes to read; None to count tasks.
        advance: is called with what was done since the last call.
    """
    # The server imports once; what it forks has no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(step).__module__])
    forkserver.ensure_running()  # now, as it would hand down the signals that are blocked while workers are started
    read = context.RawArray("d", len(ranks))  # one slot for each task: none is locked when a process is killed
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(step, tasks, read)) as pool:
        try:
            left, reported = _submit_all(pool, ranks), 0.0
            while left:
                done, left = wait(left, _SECONDS_BETWEEN_COUNTS, FIRST_COMPLETED)
                for task in done:
                    task.result()
                counted = len(ranks) - len(left) if size is None else sum(read)
                advance(counted - reported)
                reported = counted
        except (BrokenProcessPool, EOFError, ConnectionError):  # the last two: of the server, when it was killed
            time.sleep(SIGNAL_SECONDS)
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


def _submit_all(pool: ProcessPoolExecutor, ranks: Sequence[int]) -> set[Future[None]]:
    """Hand all tasks to the pool, which starts its workers for them: signals wait until it knows each of these."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a new process inherits it
    try:
        return {pool.submit(_run_task, slot, rank) for slot, rank in enumerate(ranks)}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: tuple[JobStep, int, Any] | None = None
"""In a worker process: the step, the number of its tasks, and the bytes that each task has read."""


def _begin(step: JobStep, tasks: int, read: Any) -> None:
    global _work
    _work = step, tasks, read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    end_with_parent()


def _run_task(slot: int, rank: int) -> None:
    assert _work is not None
    step, tasks, read = _work

    def add(size: float) -> None:
        read[slot] += size

    in_process.on_bytes = add
    try:
        step(rank=rank, world_size=tasks)
    except (SystemExit, KeyboardInterrupt):
        os._exit(1)  # the pool would take it for the task's result and go on with the next task


def end_with_parent() -> None:
    """End this worker process when its parent was killed; it would wait for work forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
