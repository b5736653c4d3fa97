"""Steps that are passed over: without finite numbers, with a spike, or without a label that counts.

A skipped step consumes its samples and has its number, so that data and schedules go on as they would have; only the
update is left out. What decides is the same on all processes, and a checkpoint carries it: a resumed run, under
whatever layout, skips what the uninterrupted run skips.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

from steel_megatron.config import TrainingConfig
from steel_megatron.data.strict_json import Rule, from_json, list_of, to_json, whole
from steel_megatron.errors import CheckpointError, DataError
from steel_megatron.platform import probe
from steel_megatron.train.loss_scale import LossScale

FILE = "skipped_steps.json"
"""In a checkpoint's folder."""
_SHOWN = 12
"""Documents, or ranges of them, that a line names of each corpus."""
_NUMBER = Rule(lambda value: type(value) in (int, float) or value in ("nan", "inf", "-inf"), "a number")
_DOCUMENTS = Rule(
    lambda value: isinstance(value, dict) and all(map(list_of(whole(), "").holds, value.values())), "numbers by corpus"
)
_FINITE = Rule(lambda value: type(value) in (int, float) and math.isfinite(value), "a finite number")


@dataclass(frozen=True)
class SkippedStep:
    """A step without an update."""

    step: Annotated[int, whole(1)]
    why: str
    loss: Annotated[float | str, _NUMBER]
    """A word where it is not finite, as in the norm of the gradient."""
    grad_norm: Annotated[float | str, _NUMBER]
    samples: Annotated[tuple[int, ...], list_of(whole(), "a list of whole numbers")] = ()
    """The first of the run's samples that it had, and the one after the last."""
    documents: Annotated[Mapping[str, Any], _DOCUMENTS] = field(default_factory=dict)
    """Numbers of documents by corpus."""


@dataclass(frozen=True)
class History:
    """What decides whether later steps are skipped, and what was."""

    skipped: tuple[SkippedStep, ...] = ()
    not_finite_in_a_row: Annotated[int, whole()] = 0
    spikes_in_a_row: Annotated[int, whole()] = 0
    losses: Annotated[tuple[float, ...], list_of(_FINITE, "a list of finite numbers")] = ()
    """Of the last accepted steps; empty where spikes are not skipped."""
    grad_norms: Annotated[tuple[float, ...], list_of(_FINITE, "a list of finite numbers")] = ()
    loss_scale: Annotated[tuple[float, ...], list_of(_FINITE, "a list of finite numbers")] = ()
    """In float16, the state of the loss scale after the last step."""

    def __post_init__(self) -> None:
        if len(self.loss_scale) not in (0, LossScale.NUMBERS):
            raise DataError(f"loss_scale has {len(self.loss_scale)} numbers; it must have {LossScale.NUMBERS} or none")
        if len(self.losses) != len(self.grad_norms):
            raise DataError(f"{len(self.losses)} losses and {len(self.grad_norms)} grad_norms; there must be as many")


def agreed(loss: float, grad_norm: float) -> tuple[float, float]:
    """The same two numbers on all processes: the largest, and one that is not finite if it is so on any of them.

    Args:
        loss: this process's.
        grad_norm: this process's.
    """
    rows = [[x if math.isfinite(x) else -math.inf, math.isinf(x), math.isnan(x)] for x in (loss, grad_norm)]
    largest = torch.tensor(rows, dtype=torch.float64, device=probe().device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    values = [math.nan if nan else math.inf if inf else value for value, inf, nan in largest.tolist()]
    return values[0], values[1]


class BadSteps:
    """Decides which steps of a run are skipped.

    Args:
        training: the run's settings.
        loss_scale: of a run in float16.
    """

    def __init__(self, training: TrainingConfig, loss_scale: LossScale | None = None) -> None:
        self._settings, self._loss_scale = training, loss_scale
        self.restore(History())

    def restore(self, history: History) -> None:
        """Decide as the run did that left this history."""
        self._skipped = list(history.skipped)
        self._not_finite, self._spikes = history.not_finite_in_a_row, history.spikes_in_a_row
        wanted = self._settings.skip_spikes is not None
        size = self._settings.spike_window if wanted else 0
        self._window = deque(zip(history.losses, history.grad_norms, strict=True), maxlen=size)
        if self._loss_scale is not None and history.loss_scale:
            self._loss_scale.restore(history.loss_scale)

    @property
    def history(self) -> History:
        """What a checkpoint carries."""
        losses, norms = tuple(zip(*self._window, strict=True)) or ((), ())
        scale = self._loss_scale.state if self._loss_scale else ()
        return History(tuple(self._skipped), self._not_finite, self._spikes, losses, norms, scale)

    @property
    def skipped(self) -> int:
        """How many steps were skipped."""
        return len(self._skipped)

    def why_skip(self, step: int, loss: float, grad_norm: float, labels: int) -> str | None:
        """Why a step is skipped, which is noted; None if it is not.

        Args:
            step: its number.
            loss, grad_norm: the same on all processes, see :func:`agreed`.
            labels: how many labels count.

        Returns:
            the reason in words.
        """
        why = self._judge(loss, grad_norm, labels)
        if why is None:
            self._spikes = 0
            self._window.append((loss, grad_norm))
        else:
            self._skipped.append(SkippedStep(step, why, _as_json(loss), _as_json(grad_norm)))
        return why

    def _judge(self, loss: float, grad_norm: float, labels: int) -> str | None:
        if not labels:
            return "none of its labels counts"
        if not math.isfinite(loss):
            self._not_finite += 1
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            if self._loss_scale is not None and self._loss_scale.can_fall:
                return f"gradients overflow float16 at a loss scale of {self._loss_scale.value:g}"
            self._not_finite += 1
            return f"the gradient's norm is {grad_norm} at a loss of {loss:.4f}"
        self._not_finite = 0
        spike = self._spike(loss, grad_norm)
        self._spikes += spike is not None
        return spike

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        limit = self._settings.skip_spikes
        if limit is None or len(self._window) < self._settings.spike_window:
            return None
        for name, value, before in zip(
            ("loss", "gradient's norm"), (loss, grad_norm), zip(*self._window, strict=True), strict=True
        ):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if value > mean + limit * deviation:
                return (
                    f"the {name} is {value:.4f}, more than {limit:g} deviations of {deviation:.2g} over {mean:.4f}, "
                    f"the mean of the last {len(before)} accepted steps"
                )
        return None

    @property
    def too_many(self) -> str | None:
        """Which option stops the run, after the last call of :meth:`why_skip`; None while it goes on."""
        settings = self._settings
        if self._not_finite > settings.skip_non_finite_steps:
            return f"training.skip_non_finite_steps is {settings.skip_non_finite_steps}"
        if self._spikes > settings.skip_spikes_in_a_row:
            return f"training.skip_spikes_in_a_row is {settings.skip_spikes_in_a_row}"
        return None

    def name(self, samples: range, documents: Mapping[str, Iterable[int]]) -> None:
        """Note what the step had that was skipped last.

        Args:
            samples: its samples.
            documents: numbers of documents by corpus.
        """
        self._skipped[-1] = dataclasses.replace(
            self._skipped[-1],
            samples=(samples.start, samples.stop),
            documents={name: list(numbers) for name, numbers in documents.items()},
        )


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def dumps(history: History) -> str:
    """A history as JSON."""
    return json.dumps(to_json(history), ensure_ascii=False) + "\n"


def load(folder: Path) -> History:
    """The history that a checkpoint carries; an empty one where it has none.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = folder / FILE
    try:
        return from_json(History, json.loads(file.read_text(encoding="utf-8")), str(file))
    except FileNotFoundError:
        return History()
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def in_words(documents: Mapping[str, Sequence[int]]) -> str:
    """Documents by corpus, such as ``code 3, 7 to 9; zh 5``."""
    return "; ".join(f"{name} {_ranges(numbers)}" for name, numbers in documents.items())


def _ranges(numbers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in found[:_SHOWN]]
    more = sum(last - first + 1 for first, last in found[_SHOWN:])
    return ", ".join(words) + (f" and {more:,} more" if more else "")
