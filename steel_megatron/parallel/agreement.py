"""Failing together: what goes wrong on one process is raised on all of them, instead of leaving the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from steel_megatron.errors import SteelError
from steel_megatron.parallel.topology import Topology

Result = TypeVar("Result")


def together(topology: Topology, action: Callable[[], Result]) -> Result:
    """Do ``action`` on every process; if it raises a SteelError on any, all of them raise.

    Args:
        topology: the process groups.
        action: anything that reads or writes outside the process; it must not communicate.

    Raises:
        SteelError: this process's own, or else one that names the first process that failed.
    """
    own, result = None, None
    try:
        result = action()
    except SteelError as error:
        own = error
    world_size = topology.launch.world_size
    failed = torch.tensor([world_size if own is None else topology.launch.rank], device=topology.device)
    dist.all_reduce(failed, op=dist.ReduceOp.MIN)
    if own is not None:
        raise own
    if failed.item() < world_size:
        raise SteelError(f"process {int(failed.item())} could not go on; its message says why")
    return result  # type: ignore[return-value]


def any_process(topology: Topology, condition: bool) -> bool:
    """Whether ``condition`` holds on at least one process."""
    flag = torch.tensor([int(condition)], device=topology.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def first_process_says(topology: Topology, number: int) -> int:
    """The first process's ``number``, on every process."""
    said = torch.tensor([number], device=topology.device)
    dist.broadcast(said, src=0)
    return int(said.item())
