"""A bar on the terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager

from steel_megatron.log import Progress, progress
from steel_megatron.train.callbacks.base import Callback, RunView
from steel_megatron.train.engine import StepResult


class ProgressBar(Callback):
    """Steps done of those that this launch is to do, with the latest loss; nothing where there is no terminal."""

    def start(self, run: RunView) -> None:
        """Show the bar."""
        remaining = max(0, run.config.training.last_step - run.step)
        self._shown: AbstractContextManager[Progress] = progress("training", remaining, "steps", plain=False)
        self._bar = self._shown.__enter__()

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Advance it."""
        self._bar.advance(note=f"{run.engine.objective.terms[0]} {result.loss:.4f}")

    def stop(self, run: RunView) -> None:
        """Take it away."""
        self._shown.__exit__(None, None, None)
