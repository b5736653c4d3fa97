"""Where the processes of a launch meet, and the store that they share: torch's TCPStore."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from steel_megatron.errors import LostRankError
from steel_megatron.parallel.stacks import is_of_a_collective

TIMEOUT = "STEEL_DISTRIBUTED_TIMEOUT_MINUTES"
_SHOWN = 8
"""Ranks that a message names."""


def store_is_rank0s() -> bool:
    """Whether rank 0 serves the store and takes it along when it ends; under torchrun, torchrun does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(timeout: datetime.timedelta, *, serve: bool = False) -> dist.TCPStore:
    """A connection of its own to the store at MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: how long to wait for its server.
        serve: whether to be its server.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def meet(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Wait until all processes have come.

    Args:
        rank: this process's number.
        world_size: how many there are.
        timeout: how long to wait for the others.

    Returns:
        the store that they share.

    Raises:
        LostRankError: some have not come, or the address of rank 0 cannot be used.
    """
    own = f"rank {rank} on {socket.gethostname()}"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    serve = rank == 0 and store_is_rank0s()
    try:
        store = connect(timeout, serve=serve)
    except RuntimeError as error:
        if serve:
            raise LostRankError(f"{own} cannot listen at {address}: {_first_line(error)}") from error
        raise LostRankError(
            f"{own} found nobody at {address} (MASTER_ADDR, MASTER_PORT), where rank 0 or torchrun should be, within "
            f"{_minutes(timeout)}; {TIMEOUT} sets how long to wait"
        ) from error
    # A later meeting of the same processes must not find the addresses of an earlier one. The store counts them, not
    # the process: one that comes to this store for the first time may have met others elsewhere.
    launch = dist.PrefixStore(f"steel/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    shared = dist.PrefixStore(str(launch.add(f"meetings of {rank}", 1)), launch)
    shared.set(f"come/{rank}", socket.gethostname())
    try:
        shared.wait([f"come/{other}" for other in range(world_size)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(world_size) if not shared.check([f"come/{other}"])]
        if not missing:
            return shared
        others = [other for other in range(world_size) if other not in missing]
        came = [f"rank {other} on {shared.get(f'come/{other}').decode()}" for other in others[:_SHOWN]]
        raise LostRankError(
            f"{named(missing)} of {world_size} did not come to {address} within {_minutes(timeout)} (there: "
            f"{', '.join(came)}{', ...' if len(others) > _SHOWN else ''}); {TIMEOUT} sets how long to wait"
        ) from error
    return shared


@contextmanager
def joining() -> Iterator[None]:
    """Say in one line that processes could not join: one was lost after it had come, and nobody knows yet which.

    Raises:
        LostRankError: a collective or a connection failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_a_collective(error):
            raise
        raise LostRankError(
            f"the processes came, but could not join: {_first_line(error)[:200]}; one of them was lost, see their own "
            f"output. If one was only slow, {TIMEOUT} sets how long to wait"
        ) from error


def named(ranks: list[int]) -> str:
    """``rank 3``, or ``ranks 3, 4, 5 and 12 more``."""
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _minutes(timeout: datetime.timedelta) -> str:
    return f"{timeout.total_seconds() / 60:g} minutes"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
