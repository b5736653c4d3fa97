"""Mode ``token``: every token is its own slots."""

from __future__ import annotations

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.config.routing import TokenFacts
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.routing.mode import RoutedLayer, RoutingMode, SharedSequences, register_routing_mode
from steel_megatron.ops import expert_weights, mixed_tokens


@register_routing_mode
class Token(TokenFacts, RoutingMode):
    """Every token through every expert: E times the work of one."""

    def multiplications(self, model: ModelConfig, network: float) -> tuple[float, float]:
        keys = model.num_experts * model.slots_per_expert * model.hidden_size  # one product with every slot's key
        return model.num_experts * network, keys + model.num_experts * model.hidden_size

    def forward(self, layer: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        mixed = mixed_tokens(x, layer.slot_input).reshape(1, -1, x.size(-1))
        results = layer.run_experts(mixed)
        by_expert = expert_weights(x, layer.phi, layer.scale)
        return torch.einsum("bte,ebtd->btd", by_expert.to(x.dtype), results.reshape(layer.num_experts, *x.shape))

    def forward_documents(self, layer: RoutedLayer, x: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        """As for one document: no token depends on another.

        Args: as for :meth:`RoutingMode.forward_documents`.
        """
        return self.forward(layer, x)  # no token depends on another

    def forward_split(self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences) -> torch.Tensor:
        """As for whole sequences: no token depends on another.

        Args: as for :meth:`RoutingMode.forward_split`.
        """
        return self.forward(layer, x)

    def forward_split_documents(
        self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences, documents: PackedDocuments
    ) -> torch.Tensor:
        """As for whole sequences of one document.

        Args: as for :meth:`RoutingMode.forward_split_documents`.
        """
        return self.forward(layer, x)
