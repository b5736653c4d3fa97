"""Segments of mode ``merged`` that several processes share: the means that merge them are sent, tokens are not.

A segment is merged by the routing of one vector: the mean of the segment before, or in the first segment of a document
its first token. The tokens of that mean, and those of the segment, may lie on several processes. So each process sums
its own tokens of the means that others need, and sends the sums, d numbers for each; which these are follows from a
:class:`~steel_megatron.model.routing.split_plan.SplitPlan`, whose "blocks" are the vectors here. Every process then
merges the experts for its own part of each segment.

Legend: B sequences of T tokens, L of this process in each, K tokens of a segment, M parts of segments of all sequences
on this process, R of one sequence at most, I spans of this process, X of them sent by each process, D sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from steel_megatron.model.routing.split import select
from steel_megatron.model.routing.split_plan import SplitPlan, split_plan
from steel_megatron.ops import expert_weights, mixed_tokens, reference
from steel_megatron.ops.plan import BlockPlan, SegmentPlan, segment_plan, segments_of_tokens
from steel_megatron.parallel.sequence import SequenceSplit


@dataclass(frozen=True)
class SplitSegments:
    """The parts of segments that one process holds, and the vectors that merge them. N is 1 or B.

    Attributes:
        vectors: who sums which tokens of each vector; its block k is the vector of the process's k-th segment.
        members: float32 [N, I, L], 1 for each token of a span.
        sizes: float32 [N, R, 1], tokens of each vector's mean; 1 where there is no vector.
        rows: int64 [M], which of the B * R vectors are there, in order.
        parts: the process's parts of segments; as many and as long for all processes that share the sequences.
    """

    vectors: SplitPlan
    members: torch.Tensor
    sizes: torch.Tensor
    rows: torch.Tensor
    parts: SegmentPlan

    def to(self, device: torch.device) -> SplitSegments:
        """The same on another device."""
        return SplitSegments(**{name: value.to(device) for name, value in vars(self).items()})


def split_segments(document_starts: torch.Tensor, block_length: int, split: SequenceSplit, rank: int) -> SplitSegments:
    """What one of the processes that share sequences does of their segments.

    Args:
        document_starts: int64 [B, T], for each token the position of the first token of its document; on the CPU.
        block_length: K.
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
    """
    whole = segment_plan(document_starts, block_length)
    segment = segments_of_tokens(document_starts, block_length)
    starts = torch.where(whole.follows, whole.starts.roll(1, 1), whole.starts)
    ends = torch.where(whole.follows, whole.starts, whole.starts + 1)
    vectors = split_plan(BlockPlan(starts, ends, segment), split, rank, equal_blocks=False)
    of_ranks = [_parts(segment[:, split.positions(one)]) for one in range(split.ranks)]
    parts = of_ranks[rank]
    place = parts.place_of_token
    longest = max(one.longest for one in of_ranks)
    parts = replace(
        parts,
        total=max(one.total for one in of_ranks),
        longest=longest,
        place_of_token=place // parts.longest * longest + place % parts.longest,
    )
    sizes = torch.ones(parts.lengths.shape)
    for row, own in enumerate(segment[:, split.positions(rank)]):
        read = own.unique()
        sizes[row, : len(read)] = (ends - starts)[row, read].float()
    tokens = torch.arange(len(split.positions(rank)))
    members = (tokens >= vectors.starts.unsqueeze(-1)) & (tokens < vectors.ends.unsqueeze(-1))
    rows = parts.real.flatten().nonzero().squeeze(1)
    return SplitSegments(vectors, members.float(), sizes.unsqueeze(-1), rows, parts)


@functools.lru_cache(maxsize=64)
def split_segments_of_one_document(
    batch: int, block_length: int, split: SequenceSplit, rank: int, device: torch.device
) -> SplitSegments:
    """:func:`split_segments` where every sequence is one document.

    Args:
        batch: B.
        block_length: K.
        split: who holds which tokens.
        rank: this process's number among those that share a sequence.
        device: where the plan's tensors are.
    """
    starts = torch.zeros(batch, split.length, dtype=torch.int64)
    return split_segments(starts, block_length, split, rank).to(device)


def _parts(segment: torch.Tensor) -> SegmentPlan:
    """The parts of segments that a process holds; segment int64 [B, L] ascending, the segment of each of its tokens."""
    opens = torch.ones_like(segment, dtype=torch.bool)
    opens[:, 1:] = segment[:, 1:] != segment[:, :-1]
    tokens = torch.arange(segment.size(1)).expand_as(segment)
    starts = torch.where(opens, tokens, 0).cummax(1).values
    # A part is a document of its own that is not longer than a segment.
    return segment_plan(starts, segment.size(1))


def merge_weights_split(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    *,
    mix: str,
    plan: SplitSegments,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """:func:`steel_megatron.ops.merge_weights` for the parts of segments that this process holds.

    Args:
        x: [B, L, d], this process's tokens.
        phi: [d, E, P].
        scale: [1].
        mix: what the mean is taken of: ``raw`` tokens, or ``normalized`` ones.
        plan: this process's plan.
        gather: every process's tensor on each, [...] to [ranks, ...], in the order of the plan's split.

    Returns:
        [M, E] in float32 or wider, with zeros for the parts that only fill up. Gradients of ``phi`` and ``scale`` are
        partial: those of the process's own parts.
    """
    mixed, vectors = mixed_tokens(reference.upcast(x), mix), plan.vectors
    sums = F.pad(plan.members.to(mixed.dtype) @ mixed, (0, 0, 0, 1))  # [B, I + 1, d], and a sum of no tokens
    means = select(sums, vectors.own_span)
    if vectors.sent.size(1):
        gathered = gather(select(sums, vectors.sent)).transpose(0, 1).flatten(1, 2)
        means = means + select(vectors.sets.to(mixed.dtype) @ gathered, vectors.set_of_block)
    means = means / plan.sizes.to(mixed.dtype)
    weights = expert_weights(means.flatten(0, 1)[plan.rows].unsqueeze(0), phi, scale).squeeze(0)
    return F.pad(weights, (0, 0, 0, plan.parts.total - len(plan.rows)))
