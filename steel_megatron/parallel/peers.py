"""Who is gone, when a collective fails because a process of the launch was killed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import torch.distributed as dist

from steel_megatron.errors import SteelError

SECONDS = 2.0
"""A killed process may close its connections a moment before it is gone."""


class Peers:
    """The processes of a launch, by rank; every process makes one together."""

    def __init__(self) -> None:
        own = psutil.Process()
        self._processes: list[tuple[str, int, float]] = [("", 0, 0.0)] * dist.get_world_size()
        dist.all_gather_object(self._processes, (socket.gethostname(), own.pid, own.create_time()))

    def lost(self) -> list[str]:
        """Those on this machine that are gone; of other machines it is not known."""
        return [
            f"rank {rank} (process {pid} on {host})"
            for rank, (host, pid, began) in enumerate(self._processes)
            if host == socket.gethostname() and not _runs(pid, began)
        ]

    @contextmanager
    def named(self, phase: Callable[[], str]) -> Iterator[None]:
        """Turn the error of a collective into one that names the rank that was lost.

        Args:
            phase: what this process is at.

        Raises:
            SteelError: a process of this machine is gone.
        """
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + SECONDS
            while not (lost := self.lost()) and time.monotonic() < until and len(self._processes) > 1:
                time.sleep(0.05)
            if not lost:
                raise
            raise SteelError(
                f"lost {', '.join(lost)} in {phase()}; it was killed or has crashed, see its own output. The same "
                "command resumes from the newest checkpoint"
            ) from error


def _runs(pid: int, began: float) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return bool(process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE)
    return False
