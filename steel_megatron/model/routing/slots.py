"""What the modes with slots share: tokens are mixed into slots, experts compute the slots, tokens mix the results."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.routing.mode import RoutedLayer, RoutingMode, SharedSequences
from steel_megatron.model.routing.split import dispatch_split
from steel_megatron.model.routing.split_plan import SplitPlan, split_plan, split_plan_of_one_document
from steel_megatron.ops import Routing, combine
from steel_megatron.ops.plan import block_plan
from steel_megatron.ops.soft_moe import dispatch_blocks


class SlotRouting(RoutingMode):
    """Dispatch, experts, combine (Soft MoE, arXiv 2308.00951, section 2.1); modes differ in their blocks of tokens."""

    replicated_slots: ClassVar[bool]
    """Whether all processes that share a sequence of one document have the same slots."""

    @abstractmethod
    def refresh_length(self, block_length: int) -> int | None:
        """Tokens between two refreshes of the slots; None for one set of slots over all tokens of a document."""

    @abstractmethod
    def refreshes(self, model: ModelConfig) -> int:
        """Sets of slots of a sequence."""

    def multiplications(self, model: ModelConfig, network: float) -> tuple[float, float]:
        slots = model.num_experts * model.slots_per_expert
        # the experts once for each slot of each refresh; logits, dispatch and combine for each token
        experts = self.refreshes(model) * slots * network / model.sequence_length
        return experts, 3 * slots * model.hidden_size

    def forward(self, layer: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        plan = block_plan(x.size(1), self.refresh_length(layer.block_length), x.device)
        return _compute(layer, *dispatch_blocks(x, layer.phi, layer.scale, layer.slot_input, plan))

    def forward_documents(self, layer: RoutedLayer, x: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        """Slots are means over tokens of one document.

        Args: as for :meth:`RoutingMode.forward_documents`.
        """
        plan = documents.block_plan(self.refresh_length(layer.block_length))
        return _compute(layer, *dispatch_blocks(x, layer.phi, layer.scale, layer.slot_input, plan))

    def forward_split(self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences) -> torch.Tensor:
        """Slots are means over the tokens of all processes: partial means are sent, not tokens.

        Args: as for :meth:`RoutingMode.forward_split`.
        """
        plan = split_plan_of_one_document(
            shared.split, shared.rank, self.refresh_length(layer.block_length), shared.equal_blocks, x.device
        )
        dispatched = dispatch_split(x, layer.phi, layer.scale, layer.slot_input, plan, shared.gather)
        return _compute(layer, *dispatched, replicated=self.replicated_slots)

    def forward_split_documents(
        self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences, documents: PackedDocuments
    ) -> torch.Tensor:
        """Slots are means over the tokens of one document, on whichever processes they are.

        Args: as for :meth:`RoutingMode.forward_split_documents`.
        """
        refresh = self.refresh_length(layer.block_length)

        def make(document_starts: torch.Tensor) -> SplitPlan:
            whole = block_plan(shared.split.length, refresh, torch.device("cpu"), document_starts)
            plan = split_plan(whole, shared.split, shared.rank, equal_blocks=shared.equal_blocks)
            return plan.filled_up(documents.most(plan.own_span.size(1))).to(x.device)

        # Each process has the slots of the documents that its own tokens are of.
        plan = documents.once("split blocks", make)
        return _compute(layer, *dispatch_split(x, layer.phi, layer.scale, layer.slot_input, plan, shared.gather))


def _compute(layer: RoutedLayer, slots: torch.Tensor, routing: Routing, *, replicated: bool = False) -> torch.Tensor:
    """Experts and combine: slots [B, R, E, P, d] to [B, L, d]; ``replicated`` as for ``run_experts``."""
    batch, blocks, experts, per_expert, width = slots.shape
    by_expert = slots.permute(2, 0, 1, 3, 4).reshape(experts, -1, width)
    results = layer.run_experts(by_expert, replicated=replicated)
    results = results.reshape(experts, batch, blocks, per_expert, width)
    return combine(results.permute(1, 2, 0, 3, 4), routing)
