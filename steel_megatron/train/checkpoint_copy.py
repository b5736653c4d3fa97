"""Copies of a run's state in memory of this machine, made by a thread while training goes on.

Weights and the optimizer's state change only when the optimizer updates them. So their copy has the time of the next
forward and backward pass, and the update waits for what is left of it. All else is copied at once.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from steel_megatron.errors import CheckpointError


class HostMemory:
    """Memory of this machine that keeps copies of tensors, the same memory from save to save."""

    def __init__(self) -> None:
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def take(self, item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor; on a GPU it is only begun."""
        own = self._copies.get(item.index)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[item.index] = own
        return own.copy_(tensor, non_blocking=True)


class Copy:
    """A copy that is being made, in a thread that begins at once.

    Args:
        memory: where to; what it holds stays as it is until the next copy.
        tensors: what to copy.
        steady: addresses of storages that stay as they are until :meth:`wait` returns; tensors in others are copied
            at once.
    """

    def __init__(
        self, memory: HostMemory, tensors: Sequence[tuple[WriteItem, torch.Tensor]], steady: Container[int]
    ) -> None:
        self._memory, self._copies = memory, dict[MetadataIndex, torch.Tensor]()
        self._given_up = threading.Event()
        later = []
        for item, tensor in tensors:
            if tensor.untyped_storage().data_ptr() in steady:
                later.append((item, tensor))
            else:
                self._copies[item.index] = memory.take(item, tensor)
        device = next((tensor.device for _, tensor in tensors if tensor.is_cuda), None)
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._copied: torch.cuda.Event | None = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the last update, and the copies begun here
        thread = ThreadPoolExecutor(1, "checkpoint-copy")
        self._future = thread.submit(self._run, later, [tensor._version for _, tensor in later])
        thread.shutdown(wait=False)

    def _run(self, tensors: Sequence[tuple[WriteItem, torch.Tensor]], versions: Sequence[int]) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                for item, tensor in tensors:
                    if self._given_up.is_set():
                        raise CheckpointError("the copy was given up")
                    self._copies[item.index] = self._memory.take(item, tensor)
                if self._stream is not None:
                    self._copied = self._stream.record_event()
        except (MemoryError, RuntimeError) as error:
            raise CheckpointError(
                f"the state cannot be copied to memory of this machine ({str(error) or type(error).__name__}); "
                "checkpoint.async_save: false saves without a copy"
            ) from error
        for (item, tensor), version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                raise CheckpointError(
                    f"{item.index.fqn} was changed while it was copied; callbacks may change it, forward passes may not"
                )

    def wait(self) -> None:
        """Return when what is copied may change; the stream of a GPU waits itself. Errors are left to the writers."""
        wait([self._future])
        if self._copied is not None:
            torch.cuda.current_stream(self._copied.device).wait_event(self._copied)

    def result(self) -> Mapping[MetadataIndex, torch.Tensor]:
        """Wait for the copies; for threads that write.

        Raises:
            CheckpointError: there is no memory for them, something was changed meanwhile, or they were given up.
        """
        self._future.result()
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies

    def give_up(self) -> None:
        """End soon, with copies that nobody will use."""
        self._given_up.set()
        wait([self._future])
