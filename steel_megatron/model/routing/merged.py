"""Mode ``merged``: each segment of tokens through one expert, merged of all (segment-level expert merging, Lory)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from steel_megatron.config import ModelConfig
from steel_megatron.config.routing import MergedFacts
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.routing.mode import RoutedLayer, RoutingMode, SharedSequences, register_routing_mode
from steel_megatron.model.routing.segment_split import (
    SplitSegments,
    merge_weights_split,
    split_segments,
    split_segments_of_one_document,
)
from steel_megatron.ops import merge_weights
from steel_megatron.ops.soft_moe import merge_weights_of_documents


@register_routing_mode
class Merged(MergedFacts, RoutingMode):
    """One expert per segment, merged by the routing of the segment before (Lory, arXiv 2405.03133)."""

    def multiplications(self, model: ModelConfig, network: float) -> tuple[float, float]:
        length = model.sequence_length
        segments = -(-length // model.block_length)
        merging = segments * model.num_experts * network / length
        keys = model.num_experts * model.slots_per_expert * model.hidden_size  # one product with every slot's key
        return network + merging, segments * keys / length

    def forward(self, layer: RoutedLayer, x: torch.Tensor) -> torch.Tensor:
        block = min(layer.block_length, x.size(1))
        shares = merge_weights(x, layer.phi, layer.scale, mix=layer.slot_input, block_length=block)
        return self._compute(layer, x, shares, block)

    def forward_documents(self, layer: RoutedLayer, x: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        """Each document starts a new segment.

        Args: as for :meth:`RoutingMode.forward_documents`.
        """
        plan = documents.segment_plan(layer.block_length)
        shares = merge_weights_of_documents(x, layer.phi, layer.scale, layer.slot_input, plan)
        results = layer.run_merged_experts(plan.to_segments(x), shares, equal_segments=False)
        return plan.from_segments(results)

    def forward_split(self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences) -> torch.Tensor:
        """The mean that merges a segment may lie on other processes, and so may a part of the segment.

        Args: as for :meth:`RoutingMode.forward_split`.
        """
        plan = split_segments_of_one_document(x.size(0), layer.block_length, shared.split, shared.rank, x.device)
        return self._compute_split(layer, x, shared, plan, equal_segments=True)

    def forward_split_documents(
        self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences, documents: PackedDocuments
    ) -> torch.Tensor:
        """Each document starts a new segment, on whichever process that is.

        Args: as for :meth:`RoutingMode.forward_split_documents`.
        """
        plan = documents.once(
            "split segments",
            lambda starts: split_segments(starts.cpu(), layer.block_length, shared.split, shared.rank).to(x.device),
        )
        return self._compute_split(layer, x, shared, plan, equal_segments=False)

    @staticmethod
    def _compute_split(
        layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences, plan: SplitSegments, *, equal_segments: bool
    ) -> torch.Tensor:
        weights = merge_weights_split(x, layer.phi, layer.scale, mix=layer.slot_input, plan=plan, gather=shared.gather)
        results = layer.run_merged_experts(plan.parts.to_segments(x), weights, equal_segments=equal_segments)
        return plan.parts.from_segments(results)

    def _compute(self, layer: RoutedLayer, x: torch.Tensor, shares: torch.Tensor, block: int) -> torch.Tensor:
        batch, length, width = x.shape
        segments = shares.size(1)
        padded = F.pad(x, (0, 0, 0, segments * block - length)).reshape(batch * segments, block, width)
        y = layer.run_merged_experts(padded, shares.flatten(0, 1))
        return y.reshape(batch, segments * block, width)[:, :length]
