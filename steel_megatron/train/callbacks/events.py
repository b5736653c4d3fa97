"""The run's part of ``events.jsonl``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steel_megatron import events
from steel_megatron.train.callbacks.base import Callback, RunView
from steel_megatron.train.engine import StepResult

PROGRESS_SECONDS = 30.0
"""Between two lines that only say how far the run is; the first one comes after the first step."""


class EventLog(Callback):
    """Writes where the run starts, how far it is, its saves and its end, on rank 0.

    Attributes:
        longest_step: seconds of the longest step of this launch.
    """

    def __init__(self, save_seconds: Callable[[], float | None]) -> None:
        """Take what says how long the last save took."""
        self._save_seconds = save_seconds
        self._step_seconds = 0.0
        self._tokens = 0
        self._loss: float | None = None
        self._at: dict[int, float] = {}
        """Seconds in steps until each step that no save has covered yet."""
        self.longest_step = 0.0

    def start(self, run: RunView) -> None:
        """Take note of a start, or of a resume."""
        self._began, self._written = time.monotonic(), -PROGRESS_SECONDS  # the first step is told of
        world_size, training = run.topology.launch.world_size, run.config.training
        facts = {"step": run.step, "of": training.train_steps, "layout": run.topology.describe()}
        tokens = training.global_batch_size * run.config.model.sequence_length
        self._record(run, "resume" if run.step else "start", **facts, processes=world_size, tokens_per_step=tokens)

    def before_step(self, run: RunView) -> None:
        """A step begins."""
        self._step_began = time.monotonic()

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Count a step, and say now and then how far the run is."""
        now = time.monotonic()
        self.longest_step = max(self.longest_step, now - self._step_began)
        self._step_seconds += now - self._step_began
        self._tokens += result.tokens
        self._loss = result.loss if math.isfinite(result.loss) else None
        self._at[result.step] = self._step_seconds
        if now - self._written >= PROGRESS_SECONDS:
            self._written = now
            self._record(run, "progress", **self._state(run))

    def after_save(self, run: RunView, path: Path) -> None:
        """Take note of a save; that of an earlier step may end only now."""
        step = int(path.name.rpartition("_")[2])
        facts = {**self._state(run), "step": step, "step_seconds": round(self._at.get(step, self._step_seconds), 3)}
        self._at = {later: seconds for later, seconds in self._at.items() if later > step}
        self._record(run, "save", **facts, seconds=_rounded(self._save_seconds()))

    def ended(self, run: RunView, reason: str) -> None:
        """Take note of the end of this launch.

        Args:
            run: the run.
            reason: ``finished``, ``signal``, ``time limit`` or ``stop_after_step``.
        """
        seconds = round(time.monotonic() - self._began, 3)
        self._record(run, "stop", **self._state(run), reason=reason, seconds=seconds)

    def _state(self, run: RunView) -> dict[str, Any]:
        rate = round(self._tokens / self._step_seconds, 1) if self._step_seconds else None
        seconds = round(self._step_seconds, 3)
        return {"step": run.step, "loss": self._loss, "tokens_per_second": rate, "step_seconds": seconds}

    def _record(self, run: RunView, event: str, **facts: Any) -> None:
        if run.is_rank0:
            events.record(Path(run.config.checkpoint.directory), event, **facts)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
