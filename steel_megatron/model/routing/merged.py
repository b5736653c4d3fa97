"""Mode ``merged``: each segment of tokens through one expert, merged of all (segment-level expert merging, Lory)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from steel_megatron.config import ModelConfig
from steel_megatron.config.routing import MergedFacts
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.routing.mode import RoutedLayer, RoutingMode, SharedSequences, register_routing_mode
from steel_megatron.ops import expert_weights, merge_weights, mixed_tokens, reference
from steel_megatron.ops.soft_moe import merge_weights_of_documents
from steel_megatron.parallel.sequence import SequenceSplit


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
        """The mean that merges a chunk's first segment may come from another process.

        Args: as for :meth:`RoutingMode.forward_split`.
        """
        block, mix = layer.block_length, layer.slot_input
        shares = merge_weights_split(x, layer.phi, layer.scale, mix=mix, block_length=block, shared=shared)
        return self._compute(layer, x, shares, block)

    def _compute(self, layer: RoutedLayer, x: torch.Tensor, shares: torch.Tensor, block: int) -> torch.Tensor:
        batch, length, width = x.shape
        segments = shares.size(1)
        padded = F.pad(x, (0, 0, 0, segments * block - length)).reshape(batch * segments, block, width)
        y = layer.run_merged_experts(padded, shares.flatten(0, 1))
        return y.reshape(batch, segments * block, width)[:, :length]


def merge_weights_split(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, *, mix: str, block_length: int, shared: SharedSequences
) -> torch.Tensor:
    """:func:`steel_megatron.ops.merge_weights` for this process's segments.

    A segment is computed with the routing of the mean of the segment before. Where that one lies on another process,
    the mean comes from there: one vector for each chunk and sequence.

    Args:
        x: [B, L, d], this process's tokens; its chunks begin and end with segments.
        phi: [d, E, P].
        scale: [1].
        mix: what the mean is taken of.
        block_length: tokens of a segment.
        shared: the processes that share the sequences.

    Returns:
        [B, L / block_length, E] in float32 or wider.
    """
    mixed = mixed_tokens(reference.upcast(x), mix)
    means = mixed.unflatten(1, (-1, block_length)).mean(2)
    held = shared.split.ranges[shared.rank]
    offsets, total = [], 0
    for start, stop in held:
        offsets.append(total)
        total += (stop - start) // block_length
    # The last segment's mean of each chunk; of an empty chunk nobody asks for it.
    last = [
        max(0, offset + (stop - start) // block_length - 1) for offset, (start, stop) in zip(offsets, held, strict=True)
    ]
    gathered = shared.gather(means[:, last])  # [ranks, B, chunks, d]
    # The first token stands at the end. All are one tensor, so that backward reaches the collective on every process.
    known = torch.cat((gathered.transpose(0, 1).flatten(1, 2), mixed[:, :1]), dim=1)
    before = []
    for offset, (start, stop) in zip(offsets, held, strict=True):
        if start < stop:
            before.append(known[:, [_ending_at(start, shared.split)]])
            before.append(means[:, offset : offset + (stop - start) // block_length - 1])
    return expert_weights(torch.cat(before, dim=1), phi, scale)


def _ending_at(position: int, split: SequenceSplit) -> int:
    """The number of the chunk that ends at a position, counted over all processes; one past the last for position 0."""
    ends = [stop if start < stop else -1 for held in split.ranges for start, stop in held]
    return ends.index(position) if position else len(ends)
