"""How preferences are optimized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steel_megatron.config.checks import one_of, typed
from steel_megatron.errors import ConfigError

PreferenceLoss = Literal["sigmoid", "ipo"]


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """How preferences are optimized (training.objective dpo)."""

    loss: PreferenceLoss = "sigmoid"
    """Loss of a pair: sigmoid as in DPO, or ipo, on log-probabilities per token."""
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round, for the loss sigmoid."""
    sft_weight: float = 0.0
    """Weight of the cross entropy of the chosen answer, per token, that is added to a pair's loss."""

    def __post_init__(self) -> None:
        typed(self)
        one_of(get_args(PreferenceLoss), self, "loss")
        if self.beta <= 0:
            raise ConfigError(f"DpoConfig.beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss != "sigmoid"):
            raise ConfigError(
                f"DpoConfig.label_smoothing is {self.label_smoothing} with loss {self.loss}; it must be in [0, 0.5), "
                "and 0 for a loss other than sigmoid"
            )
        if self.sft_weight < 0:
            raise ConfigError(f"DpoConfig.sft_weight is {self.sft_weight}; it must be at least 0")
