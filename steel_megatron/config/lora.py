"""Low-rank adapters in place of all weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steel_megatron.config.checks import at_least, below_one, typed
from steel_megatron.config.model import ModelConfig
from steel_megatron.config.parallel import ParallelConfig
from steel_megatron.errors import ConfigError

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
ATTENTION: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj")
FEED_FORWARD: tuple[LoraTarget, ...] = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA): trains W + alpha / rank * B A with frozen W, the weights of checkpoint.init_from."""

    rank: int | None = None
    """Rank of the adapters; none trains all weights."""
    alpha: float = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability with which training drops an element of an adapter's input; adapters of attention only."""
    targets: list[LoraTarget] = field(default_factory=lambda: [*ATTENTION, *FEED_FORWARD])
    """Which projections have adapters: to queries, keys and values (linear_qkv), after attention (linear_proj), into
    (linear_fc1) and out of (linear_fc2) feed-forward networks, those of all experts included."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "rank")
        below_one(self, "dropout")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"LoraConfig.alpha is {self.alpha}; it must be above 0 and finite")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"LoraConfig.targets is {self.targets}; name some of {[*ATTENTION, *FEED_FORWARD]}, each once"
            )
        feed_forward = [name for name in self.targets if name in FEED_FORWARD]
        if self.dropout and feed_forward:
            raise ConfigError(
                f"LoraConfig.dropout is {self.dropout}, and targets has {feed_forward[0]}; only adapters of attention "
                f"have dropout, as experts are given slots, not tokens: set it to 0, or targets to {list(ATTENTION)}"
            )


def check_lora(lora: LoraConfig, model: ModelConfig, parallel: ParallelConfig, init_from: str | None) -> None:
    """Check that a run can train the adapters that it asks for.

    Args:
        lora: the adapters.
        model: what they adapt.
        parallel: how that is cut.
        init_from: the checkpoint with its weights.

    Raises:
        ConfigError: it cannot; the message says what to change.
    """
    if lora.rank is None:
        return
    asked = f"lora.rank is {lora.rank}"
    if init_from is None:
        raise ConfigError(f"{asked}, but there is nothing to adapt; name a checkpoint in checkpoint.init_from")
    feed_forward = [name for name in lora.targets if name in FEED_FORWARD]
    if feed_forward and model.ffn in ("none", "top_k_moe"):
        lacks = "has no feed-forward layers" if model.ffn == "none" else "computes megatron-core's own experts"
        raise ConfigError(
            f"lora.targets has {feed_forward[0]}, but ffn = {model.ffn} {lacks}, which have no adapters; set "
            f"lora.targets to {list(ATTENTION)}"
        )
    if parallel.fsdp:
        raise ConfigError(
            f"{asked} with parallel.fsdp, which shards gradients and optimizer state: frozen weights have none, so "
            "leave fsdp unset, and cut weights that are too large by tensor or pipeline parallelism"
        )
    if 0 in (layers := parallel.layers_of_chunks(model.num_layers)):
        raise ConfigError(
            f"{asked} with parallel.pipeline_layers = {layers}: a stage without layers has nothing to train; give each "
            "stage a layer"
        )
    if model.implementation == "transformer_engine":
        raise ConfigError(
            f"{asked} with model.implementation = transformer_engine, whose fused layers have no adapters; set it to "
            "auto or local"
        )
