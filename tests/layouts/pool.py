"""Processes that run one distributed task after the other, so that each does not wait for Python and torch to start."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from steel_megatron.parallel.topology import free_port
from tests.distributed import PRELOAD

MOST_THREADS = 60
"""With which a process takes another task."""
GRACE = 5.0
"""Seconds that the others have to answer after one process has failed."""


def _serve(tasks: Connection) -> None:
    """Run tasks until there are no more; each gets process groups of its own, which are left after it."""
    os.environ.update(OMP_NUM_THREADS="1", STEEL_DISTRIBUTED_TIMEOUT_MINUTES="8", MASTER_ADDR="localhost")
    import torch

    torch.set_num_threads(1)
    from steel_megatron.parallel.topology import shutdown

    while True:
        try:
            function, args, launch = pickle.loads(tasks.recv_bytes())
        except EOFError:
            return
        os.environ.update(launch)
        try:
            outcome = ("result", function(*args))
            shutdown()
            gc.collect()
        except BaseException as error:
            outcome = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        # After an error its process groups are in no known state. And megatron-core's hooks that reduce gradients early
        # keep a run and its groups alive, each with threads that wake up again and again.
        again = outcome[0] == "result" and len(os.listdir("/proc/self/task")) <= MOST_THREADS
        tasks.send_bytes(pickle.dumps((*outcome, again)))
        if not again:
            return


class Task:
    """Something that runs on several processes of a pool."""

    def __init__(self, workers: list[Worker], deadline: float, release: Callable[[list[Worker]], None]) -> None:
        self._workers, self._deadline, self._release = workers, deadline, release

    def results(self) -> list[Any]:
        """What each process returned, by rank.

        Raises:
            AssertionError: a process failed, died or did not answer in time. All processes of the task are ended.
        """
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline, size = self._deadline, len(self._workers)
        waiting = dict(enumerate(self._workers))
        try:
            while waiting:
                ready = wait([one.tasks for one in waiting.values()], max(0.0, deadline - time.monotonic()))
                if not ready:
                    if not failures:
                        failures = {rank: "did not answer in time" for rank in waiting}
                    break
                for rank in [rank for rank, one in waiting.items() if one.tasks in ready]:
                    kind, value = waiting.pop(rank).answer()
                    if kind == "result":
                        results[rank] = value
                    else:
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + GRACE)
        finally:
            for worker in self._workers:
                if len(results) < size or not worker.again:
                    worker.kill()
            self._release([worker for worker in self._workers if worker.again])
        if failures:
            # The first one failed by itself; what the others say is often only that it is gone.
            said = "\n".join(f"rank {rank} of {size} {what}" for rank, what in failures.items())
            raise AssertionError(said)
        return [results[rank] for rank in range(size)]


class Worker:
    """One process, and the connection over which it gets tasks and answers."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.tasks, theirs = context.Pipe()
        self.again = True
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[str, Any]:
        """Its answer, or that it died; afterwards ``again`` says whether it takes another task."""
        try:
            kind, value, self.again = pickle.loads(self.tasks.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(GRACE)
            return "error", f"died with exit code {self.process.exitcode}"
        return kind, value if kind == "result" else f"failed: {value}"

    def kill(self) -> None:
        """End it at once."""
        self.again = False
        self.process.kill()
        self.process.join()
        self.tasks.close()


class Pool:
    """As many processes as the largest task has needed so far; those that end are replaced."""

    def __init__(self) -> None:
        self._idle: list[Worker] = []

    def start(self, function: Callable[..., Any], processes: int, *args: Any, timeout: float = 500.0) -> Task:
        """Begin ``function(*args)`` on so many processes, which see torchrun's variables.

        Args:
            function: a function at the top of a module; its result must be picklable.
            processes: how many.
            args: passed to every process.
            timeout: seconds until all of them must have answered.
        """
        idle = [worker for worker in self._idle if worker.process.is_alive()]
        workers, self._idle[:] = idle[:processes], idle[processes:]
        workers += [Worker() for _ in range(processes - len(workers))]
        launch = {"WORLD_SIZE": str(processes), "MASTER_PORT": str(free_port())}
        for rank, worker in enumerate(workers):
            own = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            worker.tasks.send_bytes(pickle.dumps((function, args, own)))
        return Task(workers, time.monotonic() + timeout, self._idle.extend)

    def run(self, function: Callable[..., Any], processes: int, *args: Any, timeout: float = 500.0) -> list[Any]:
        """:meth:`start`, and wait for the results."""
        return self.start(function, processes, *args, timeout=timeout).results()

    def close(self) -> None:
        """End all idle processes."""
        for worker in self._idle:
            worker.kill()
        self._idle.clear()
