"""The wish to stop: signals with which schedulers, launchers and people announce the end of a job."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from steel_megatron.errors import ExitCode
from steel_megatron.log import get_logger
from steel_megatron.streams import complain

logger = get_logger(__name__)

GRACE_SECONDS = 10.0
"""A launcher and a scheduler may each send the same signal: within this time, further ones are the same wish."""
_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Notices SIGTERM, SIGUSR1 and SIGINT. In a thread other than the main one, which gets none, it notices nothing.

    The first one asks to save and stop. Further ones change nothing, but for a SIGINT that comes ten seconds or more
    after the first SIGINT: it ends the process at once. This also works while the main thread waits in C++.

    Attributes:
        received: whether one has come.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._told = False
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self._wakeup = -1
        self._pipe = (-1, -1)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
            thread.start()
            # Python's handlers wait for the main thread to leave C++. The number in the pipe does not.
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                if signal.getsignal(number) == self._note:  # else somebody wants it another way from now on
                    signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # the thread ends
            self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in self.SIGNALS:
                    self._handle(signal.Signals(number), time.monotonic())
        os.close(pipe)

    def _handle(self, number: signal.Signals, now: float) -> None:
        self.received = True
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted >= GRACE_SECONDS:
                complain("interrupted again: ended without waiting for the save")
                os._exit(ExitCode.INTERRUPTED)
            self._interrupted = now if self._interrupted is None else self._interrupted
        if not self._told:
            self._told = True
            again = f"; Ctrl-C again after {GRACE_SECONDS:.0f} s ends it at once" if number == signal.SIGINT else ""
            logger.info(f"{number.name}: the step under way is finished and saved, then the run stops{again}")


def ignore_stop_signals() -> None:
    """Let nothing change the exit code of a process that has saved and is about to end."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_with_launcher() -> None:
    """Get SIGTERM when torchrun or Slurm's daemon of this step is gone: nobody else would end this process then.

    torchrun dies of signals that it does not know. A step whose daemon was killed is started again meanwhile.
    """
    if ("TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
