"""AdamW and the learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from steel_megatron.config.checks import at_least, one_of, typed
from steel_megatron.errors import ConfigError

LrSchedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]
WsdDecay = Literal["linear", "cosine", "exponential", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate schedule (Steel-LLM, section 5)."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, and the lowest of inverse_sqrt."""
    lr_schedule: LrSchedule = "cosine"
    """How the learning rate falls after the warm-up: cosine, linear, constant, wsd (stable, then a short decay), or
    inverse_sqrt (lr * sqrt(warmup_steps / step))."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Step at which the decay ends; none means training.train_steps."""
    wsd_decay_steps: int | None = None
    """Steps of the decay at the end of wsd; none means a tenth of decay_steps."""
    wsd_decay_style: WsdDecay = "minus_sqrt"
    """Shape of that decay."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: float = 1.0
    """The gradient's global norm is scaled down to this; 0 for no clipping."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's OptimizerConfig, by name (docs/extending.md lists them)."""

    def __post_init__(self) -> None:
        typed(self)
        one_of(get_args(LrSchedule), self, "lr_schedule")
        one_of(get_args(WsdDecay), self, "wsd_decay_style")
        at_least(1, self, "wsd_decay_steps")
        at_least(0, self, "lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "epsilon", "clip_grad")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"OptimizerConfig.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.min_lr > self.lr:
            raise ConfigError(f"OptimizerConfig.min_lr = {self.min_lr} is over lr = {self.lr}")
