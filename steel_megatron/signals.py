"""Ctrl-C and SIGTERM (a preempted job) as exceptions that do not come in the middle of a write."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Made by :func:`stop_signals`."""

    def __init__(self) -> None:
        self._held = False
        self._waiting: int | None = None

    def handle(self, number: int, _: FrameType | None = None) -> None:
        """Raise KeyboardInterrupt, or SystemExit with the code of a terminated process; at once or when it fits."""
        if self._held:
            self._waiting = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block come to its end first."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            self.handle(number)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn the signals that stop a job into exceptions within the block.

    In a thread other than the main one, which gets no signals, it does nothing.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_sigterm() -> None:
    """Let a process that is about to end say why: a launcher that has lost another one asks it to end meanwhile.

    In a thread other than the main one, which cannot change that, it does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
