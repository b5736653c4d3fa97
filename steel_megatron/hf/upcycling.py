"""A dense model's weights as those of a mixture of experts (sparse upcycling, arXiv 2212.05055, section 2).

Every expert is a copy of the dense network. Where the weights of a token's experts make up 1, the mixture computes at
the start what the dense model does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass

import torch

from steel_megatron.config import ModelConfig, routing_mode_names
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import ModelFolder

TOP_K = "top_k_moe"
_OF_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What a dense model becomes.

    Attributes:
        to: a routing mode of Soft-MoE layers, or ``top_k_moe``.
        num_experts: experts of a layer.
        slots_per_expert: slots of each; Soft-MoE.
        moe_top_k: experts that each token passes through; ``top_k_moe``.
        block_length: tokens of a block or segment; Soft-MoE.
        seed: of the routing's weights.
    """

    to: str
    num_experts: int = 8
    slots_per_expert: int = 1
    moe_top_k: int = 2
    block_length: int = 64
    seed: int = 0

    def model(self, dense: ModelConfig, origin: str) -> ModelConfig:
        """The settings of the mixture.

        Args:
            dense: those of the dense model.
            origin: where that came from, for the message.

        Raises:
            CheckpointError: it is not dense.
            ConfigError: there is no such mode, or the settings do not fit together.
        """
        if dense.ffn != "dense":
            raise CheckpointError(f"{origin} has {dense.ffn} layers already; only a dense model can be upcycled")
        if self.to != TOP_K and self.to not in routing_mode_names():
            raise ConfigError(f"upcycle is {self.to!r}; it must be {TOP_K}, {', '.join(routing_mode_names())}")
        changes: dict[str, object] = {"num_experts": self.num_experts}
        if self.to == TOP_K:
            changes |= {"ffn": TOP_K, "moe_top_k": self.moe_top_k}
        else:
            changes |= {"ffn": "soft_moe", "routing_mode": self.to, "slots_per_expert": self.slots_per_expert}
            changes |= {"block_length": self.block_length, "slot_input": "raw"}
        return dataclasses.replace(dense, **changes)  # type: ignore[arg-type]

    @property
    def is_exact(self) -> bool:
        """Whether the mixture computes at the start what the dense model does."""
        return self.to in ("merged", "token") or (self.to == TOP_K and self.moe_top_k > 1)


class UpcycledFolder:
    """A dense model's folder, read as that of a mixture.

    Args:
        dense: the folder.
        model: the mixture's settings.
        seed: of the routing's weights.
    """

    def __init__(self, dense: ModelFolder, model: ModelConfig, seed: int) -> None:
        self._dense, self.model, self._seed = dense, model, seed
        self._shapes = mapping.published_shapes(model)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a published tensor; routing weights are float32."""
        return torch.float32 if self._is_routing(name) else self._dense.dtype(_of_dense(name))

    def read(self, name: str) -> torch.Tensor:
        """A published tensor: the dense model's, or new routing weights."""
        if not self._is_routing(name):
            return self._dense.read(_of_dense(name))
        if name.endswith(".scale"):
            return torch.full(self._shapes[name], self.model.routing_scale_init)
        label = int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(label)
        return torch.empty(self._shapes[name]).normal_(0.0, self.model.init_method_std, generator=generator)

    @staticmethod
    def _is_routing(name: str) -> bool:
        return name.endswith((".mlp.phi", ".mlp.scale", ".mlp.gate.weight"))


def _of_dense(name: str) -> str:
    return _OF_EXPERT.sub(".mlp.", name)
