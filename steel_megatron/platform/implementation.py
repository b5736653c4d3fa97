"""Which implementation computes a model: chosen here, from what the machine has, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from steel_megatron.config import ImplementationName
from steel_megatron.errors import ConfigError
from steel_megatron.platform.probe import Platform, probe


@dataclass(frozen=True)
class Implementation:
    """What computes a model. Weights, results (up to rounding) and checkpoints are the same for all.

    Attributes:
        transformer_engine: version of transformer-engine whose fused norm with linear layer, attention, rotary
            embedding are used, and its cross entropy where an objective reads logits; None for torch's and
            megatron-core's own.
        apex_norm: whether apex computes norms.
        fused_gradients: whether apex adds the gradients of matrices to the accumulated ones within their product.
    """

    transformer_engine: str | None = None
    apex_norm: bool = False
    fused_gradients: bool = False

    def describe(self) -> str:
        """One line for the log."""
        if self.transformer_engine is not None:
            parts = f"transformer_engine {self.transformer_engine} (norm with linear, attention, rotary)"
        else:
            parts = f"local (torch's attention, {'apex' if self.apex_norm else 'torch'}'s norms)"
        return f"implementation: {parts}{', gradients accumulated by apex' if self.fused_gradients else ''}"


LOCAL = Implementation()
"""Of every machine."""


def choose_implementation(
    wanted: ImplementationName, platform: Platform | None = None, *, fully_sharded: bool = False
) -> Implementation:
    """Choose what computes a model.

    Args:
        wanted: ``model.implementation``. ``auto`` takes transformer-engine where it is installed and a GPU is there.
        platform: the machine; None looks at it.
        fully_sharded: whether the run shards its weights (``parallel.fsdp``): then apex has no accumulated gradients to
            add to, because these exist only as shards.

    Raises:
        ConfigError: transformer-engine is asked for, and this machine cannot run it.
    """
    platform = platform or probe()
    has_gpu = platform.device.type == "cuda"
    if wanted == "transformer_engine" and not has_gpu:
        raise ConfigError(
            "model.implementation is transformer_engine, which needs a GPU, and torch finds none; "
            "set it to auto or local"
        )
    if wanted == "transformer_engine" and platform.transformer_engine is None:
        raise ConfigError(
            "model.implementation is transformer_engine, which is not installed; install it (pip install "
            "--no-build-isolation 'steel-megatron[cuda]'), or set it to auto or local"
        )
    if not has_gpu:
        return LOCAL
    version = None if wanted == "local" else platform.transformer_engine
    return Implementation(
        transformer_engine=version,
        apex_norm=version is None and platform.apex_norm,
        fused_gradients=platform.apex_gradients and not fully_sharded,
    )
