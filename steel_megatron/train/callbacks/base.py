"""What happens next to training: a few hooks around the loop's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steel_megatron.config import RunConfig
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.engine import Engine, StepResult

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class RunView:
    """A run as callbacks see it. It is for reading: what a hook changes in the model changes the run."""

    config: RunConfig
    topology: Topology
    engine: Engine

    @property
    def is_rank0(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.topology.is_rank0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.engine.step_number

    @property
    def model(self) -> GPTModel:
        """This process's pipeline stage.

        Raises:
            ConfigError: it has several model chunks.
        """
        return self.engine.stage

    @property
    def chunks(self) -> list[GPTModel]:
        """This process's parts of the model: its pipeline stage, or several chunks under the interleaved schedule."""
        return self.engine.chunks


class Callback:
    """Base of all callbacks; every hook does nothing.

    Hooks run on every process, in the order of the callbacks. A hook may use collectives as long as all processes
    do, except in :meth:`start`, whose errors are raised on all processes.
    """

    def start(self, run: RunView) -> None:
        """Before the first step, after a resume."""

    def before_step(self, run: RunView) -> None:
        """Before an optimizer step; ``run.step`` are done."""

    def after_step(self, run: RunView, result: StepResult) -> None:
        """After an optimizer step."""

    def after_validation(self, run: RunView, losses: Mapping[str, float]) -> None:
        """After a validation; ``losses`` by the name of the validation set, nats per token."""

    def after_save(self, run: RunView, path: Path) -> None:
        """After a checkpoint was saved as the folder ``path``."""

    def stop(self, run: RunView) -> None:
        """At the end, also after an error: close what :meth:`start` opened."""


class EvaluatesTasks(Callback):
    """What a run with ``evaluation.tasks`` must have among its callbacks: benchmarks are a layer above training."""


class CopyFirst(Callback):
    """Lets the copy of a save end before callbacks whose hooks may change weights; without such hooks it waits never.

    Args:
        later: the callbacks after it.
    """

    def __init__(self, later: Sequence[Callback]) -> None:
        own = {name for name in vars(Callback) if not name.startswith("_")}
        self._waits = {name for name in own for one in later if getattr(type(one), name) is not getattr(Callback, name)}

    def before_step(self, run: RunView) -> None:
        """Wait if a later callback has this hook."""
        self._wait(run, "before_step")

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Wait if a later callback has this hook: the step may have been skipped, and nothing updated."""
        self._wait(run, "after_step")

    def after_validation(self, run: RunView, losses: Mapping[str, float]) -> None:
        """Wait if a later callback has this hook."""
        self._wait(run, "after_validation")

    def after_save(self, run: RunView, path: Path) -> None:
        """Wait if a later callback has this hook: the next save may have begun."""
        self._wait(run, "after_save")

    def _wait(self, run: RunView, hook: str) -> None:
        if hook in self._waits:
            run.engine.before_update()
