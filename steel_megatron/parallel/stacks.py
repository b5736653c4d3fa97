"""What a thread is at: whether it moves, whether it waits in a collective, and the stacks of all threads."""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType

_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
_OF_COLLECTIVES = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting", "Socket Timeout")


class Stillness:
    """For how long a thread has been at the same place.

    Args:
        thread: its identity.

    Attributes:
        seconds: how long.
        place: whether it waits in a collective, and where it is.
    """

    def __init__(self, thread: int) -> None:
        self._thread, self._last, self._since = thread, 0, time.monotonic()
        self.seconds = 0.0
        self.place: tuple[bool, str] = (False, "")

    def look(self, phase: str) -> None:
        """Compare with the last look; another phase is another place."""
        frames = list(_frames(sys._current_frames().get(self._thread)))
        now, here = time.monotonic(), hash((phase, *((frame.f_code, frame.f_lasti) for frame in frames)))
        if here != self._last:
            self._last, self._since = here, now
        self.seconds = now - self._since
        name = _collective((frame.f_code.co_filename, frame.f_code.co_name) for frame in reversed(frames))
        if name is not None:
            self.place = (True, name)
        elif frames:
            code = frames[0].f_code
            self.place = (False, f"{code.co_filename}:{frames[0].f_lineno} ({code.co_name})")


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def is_of_a_collective(error: BaseException) -> bool:
    """Whether another process may be why a collective failed here."""
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "/torch/distributed/" in frames[-1].filename
    return inside or any(word in str(error) for word in _OF_COLLECTIVES)


def collective_of(error: BaseException) -> str:
    """The name of the collective that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return _collective((frame.filename, frame.name) for frame in frames) or "a collective"


def _collective(frames: Iterable[tuple[str, str]]) -> str | None:
    """The collective among (file, function), from the outermost to the innermost; its caller if it has no name."""
    caller = "a collective"
    for file, function in frames:
        if file.endswith(_COLLECTIVES) and function != "wrapper":
            return caller if function.startswith("_") else function
        if not file.endswith(("/contextlib.py", _COLLECTIVES, "/torch/distributed/c10d_logger.py")):
            caller = function
    return None


def write_stacks(path: Path, phase: str) -> None:
    """Write the stacks of all threads of this process; a disk that hangs or is full is no reason to stay."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, in {phase}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
