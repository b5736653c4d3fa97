"""Whether work grows with its input or faster, where nothing in it can be counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_TIMES = 8


def is_linear(work: Callable[[int], Any], size: int) -> bool:
    """Whether eight times the input takes less than 32 times as long; quadratic work takes 64 times as long.

    Of several tries the quickest counts, in the time of this thread alone: what else a machine does adds to some. A
    size that is done within a millisecond counts as one.
    """
    quickest = {size: float("inf"), size * _TIMES: float("inf")}
    for _ in range(4):
        for length in quickest:
            begin = time.thread_time()
            work(length)
            quickest[length] = min(quickest[length], time.thread_time() - begin)
        if quickest[size * _TIMES] < 32 * max(quickest[size], 1e-3):
            return True
    return False
