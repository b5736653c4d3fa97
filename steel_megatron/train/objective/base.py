"""The seam between the engine and what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from steel_megatron.config import RunConfig
from steel_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from steel_megatron.parallel.topology import Topology

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""From a stage's output to the sum that is minimised, the number of items in it (int32), and the report: float64
[terms, 2], sum and count of each of the objective's terms."""


class Term(NamedTuple):
    """One number that an objective reports, over the whole global batch."""

    mean: float
    items: int
    """What the mean is over, such as labels."""


class Objective(Protocol):
    """What a run minimises. The engine, the loop and the metrics use only this interface.

    A batch is whatever :meth:`batch` makes and :meth:`forward_step` takes. The engine sums the reports of all micro
    batches over all processes, so an objective reports sums and counts, never means: the loss then does not depend on
    how a global batch is cut.

    Attributes:
        terms: names of what is reported. The first is what is minimised.
        items: what the mean that is minimised is over, for the log: labels, pairs, ...; ``tokens`` where it is missing.
    """

    terms: tuple[str, ...]
    items: str

    @classmethod
    def build(cls, run: RunConfig, topology: Topology, stage: GPTModel) -> Self:
        """The objective of a run, for one pipeline stage.

        Args:
            run: the run's settings.
            topology: the process groups.
            stage: this process's part of the model; the first one where it has several, which share ``documents``.
        """
        ...

    @classmethod
    def batch(cls, samples: np.ndarray, starts: np.ndarray | None, counts: torch.Tensor | None, topo: Topology) -> Any:
        """This process's part of a micro batch.

        Args:
            samples: int64 [B, T + 1] token ids.
            starts: int64 [B, T + 1], for each token the position of its document's first; None where documents that
                share a sequence see each other.
            counts: float32 [B, 1], 0 for samples that only fill up the batch; None if all count.
            topo: the process groups.
        """
        ...

    def sizes(self, batch: Any) -> dict[str, int]:
        """``seq_length`` (of whole sequences) and ``micro_batch_size``, as megatron-core's schedules ask for them."""
        ...

    def forward_step(self, batches: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """One forward of one pipeline stage (or of one of its chunks), on the next micro batch."""
        ...


OBJECTIVES: dict[str, Any] = {}
"""The classes of objectives, by the name that ``training.objective`` gives."""


def objective_of(run: RunConfig) -> Any:
    """The class of a run's objective.

    Raises:
        ConfigError: there is none of that name.
    """
    name = run.training.objective
    if name not in OBJECTIVES:
        raise ConfigError(f"training.objective is {name!r}; it must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
