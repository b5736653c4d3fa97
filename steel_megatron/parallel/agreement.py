"""Errors on one process are raised on all of them, so that the others do not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from steel_megatron.errors import SteelError
from steel_megatron.platform import probe

Result = TypeVar("Result")


def raise_if_any_rank_failed(action: Callable[[], Result]) -> Result:
    """Do ``action`` on every process; if it raises a SteelError on any, all of them raise.

    Args:
        action: anything that reads or writes outside the process; it must not communicate.

    Raises:
        SteelError: this process's own, or else one that names the first process that failed.
    """
    own, result = None, None
    try:
        result = action()
    except SteelError as error:
        own = error
    world_size = dist.get_world_size()
    failed = torch.tensor([world_size if own is None else dist.get_rank()], device=probe().device)
    dist.all_reduce(failed, op=dist.ReduceOp.MIN)
    if own is not None:
        raise own
    if failed.item() < world_size:
        raise SteelError(f"process {int(failed.item())} failed; see its own message")
    return result  # type: ignore[return-value]


def on_rank0(action: Callable[[], Result]) -> Result | None:
    """Do ``action`` on the first process alone; if it raises a SteelError there, all of them raise.

    Returns:
        what it returned, on the first process; None on the others.
    """
    return raise_if_any_rank_failed(action if dist.get_rank() == 0 else lambda: None)


def any_rank(condition: bool) -> bool:
    """Whether ``condition`` holds on at least one process."""
    flag = torch.tensor([int(condition)], device=probe().device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def broadcast_from_rank0(number: int) -> int:
    """The first process's ``number``, on every process."""
    value = torch.tensor([number], device=probe().device)
    dist.broadcast(value, src=0)
    return int(value.item())


def first_process_bytes(content: bytes) -> bytes:
    """The first process's ``content``, on every process."""
    values = torch.zeros(broadcast_from_rank0(len(content)), dtype=torch.uint8)
    if dist.get_rank() == 0 and content:
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    values = values.to(probe().device)
    dist.broadcast(values, src=0)
    return values.cpu().numpy().tobytes()
