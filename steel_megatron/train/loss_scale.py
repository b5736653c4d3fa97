"""The loss scale of training in float16.

The loss is multiplied by it, so that small gradients do not vanish in float16, and the gradients are divided by it
before they are used. A step whose gradients overflow is skipped, and the scale falls; after many good steps it rises.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from steel_megatron.train.optimizer_state import optimizers_of


def first_loss_scale(labels: int) -> dict[str, float]:
    """Fields of megatron-core's OptimizerConfig to begin with.

    torch begins at 2**16 times a mean over labels; here gradients are of sums, and a scale below 1 is nothing odd.
    megatron-core would begin at 2**32, and with more skipped steps.

    Args:
        labels: of one micro batch.
    """
    power = 16 - (labels - 1).bit_length()
    return {"initial_loss_scale": 2.0**power, "min_loss_scale": 2.0 ** (power - 16)}


class LossScale:
    """megatron-core's dynamic loss scale, one for all optimizers of a run.

    Experts with data-parallel groups of their own have an optimizer of their own, and megatron-core gives each
    optimizer a scale of its own, though there is one loss: an overflow in one of them would make them differ.

    Args:
        optimizer: the run's, in float16; its parts get this scale.
    """

    NUMBERS: ClassVar[int] = 3
    """In :attr:`state`."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        parts = optimizers_of(optimizer)
        self._scaler: DynamicGradScaler = parts[0].grad_scaler
        for part in parts:
            part.grad_scaler = self

    @property
    def scale(self) -> torch.Tensor:
        """Float32 [1]."""
        return self._scaler.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        """Its inverse, float32 [1]."""
        return self._scaler.inv_scale

    def update(self, found_inf: bool) -> None:
        """megatron-core's optimizers call it, each with its own finding; :meth:`adapt` knows of all."""

    def adapt(self, overflow: bool) -> None:
        """Raise or lower the scale after a step.

        Args:
            overflow: whether a gradient was not finite, on any process.
        """
        self._scaler.update(overflow)

    @property
    def value(self) -> float:
        """The scale."""
        return float(self._scaler.scale)

    @property
    def can_fall(self) -> bool:
        """Whether it is above its minimum, so that a smaller one may help."""
        return self.value > float(self._scaler.min_scale)

    @property
    def state(self) -> tuple[float, ...]:
        """What a checkpoint carries: the scale, steps since the last overflow, overflows until it falls."""
        return self.value, self._scaler._growth_tracker, self._scaler._hysteresis_tracker

    def restore(self, state: tuple[float, ...]) -> None:
        """Go on from a state of another :class:`LossScale`."""
        scale, growth, hysteresis = state
        self._scaler._scale.fill_(scale)
        self._scaler._growth_tracker, self._scaler._hysteresis_tracker = int(growth), int(hysteresis)
