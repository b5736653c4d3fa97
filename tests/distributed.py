"""Runs a function on several gloo processes and fails, rather than waits, when they hang."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from steel_megatron.parallel.topology import free_port

# Imported once in the fork server, so that a test's processes start at once.
PRELOAD = ["steel_megatron.train.engine", "steel_megatron.train.checkpoint"]


def _process(
    function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], answer: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        STEEL_DISTRIBUTED_TIMEOUT_MINUTES="1",
    )
    import torch

    torch.set_num_threads(1)
    from steel_megatron.parallel.topology import shutdown

    try:
        outcome = ("result", function(*args))
    except BaseException as error:
        outcome = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    answer.send_bytes(pickle.dumps(outcome))
    if outcome[0] == "result":
        shutdown()


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 200.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` processes that see torchrun's variables.

    Args:
        function: a function at the top of a module; its result must be picklable.
        world_size: number of processes.
        args: passed to every process.
        timeout: seconds until all of them must have answered.

    Returns:
        the results, by rank.

    Raises:
        AssertionError: a process failed, died or did not answer in time; the others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, deadline = free_port(), time.monotonic() + timeout
    workers = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(function, rank, world_size, port, args, sender))
        process.start()
        sender.close()
        workers.append((process, receiver))
    try:
        results = []
        for rank, (process, receiver) in enumerate(workers):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"rank {rank} of {world_size} did not answer within {timeout:.0f} s")
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                process.join(5)
                raise AssertionError(f"rank {rank} died with exit code {process.exitcode}") from None
            if kind == "error":
                raise AssertionError(f"rank {rank} failed: {value}")
            results.append(value)
        return results
    finally:
        for process, _ in workers:
            process.join(max(0.1, min(10.0, deadline - time.monotonic())))
            if process.is_alive():
                process.kill()
                process.join()
