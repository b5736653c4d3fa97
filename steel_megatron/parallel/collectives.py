"""Autograd collectives on slots and expert weights.

Slots travel, tokens do not: expert parallelism sends each expert's slots to the process that holds the expert
and brings the results back. Sizes are equal and known beforehand, so no counts are exchanged and nothing is
dropped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region


def slots_to_experts(slots: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Send every expert's slots to the process that holds the expert.

    Args:
        slots: [E, N, d], the slots of all E experts from this process's own sequences.
        group: the expert-parallel group, of size R.

    Returns:
        [E / R, R * N, d]: the slots of this process's experts from all processes, in rank order.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return slots
    experts, count, width = slots.shape
    received = all_to_all(group, slots.contiguous())  # [R source, E / R, N, d]
    received = received.view(ranks, experts // ranks, count, width)
    return received.transpose(0, 1).reshape(experts // ranks, ranks * count, width)


def slots_from_experts(results: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The way back of :func:`slots_to_experts`: [E / R, R * N, d] to [E, N, d]."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return results
    local, together, width = results.shape
    count = together // ranks
    outgoing = results.view(local, ranks, count, width).transpose(0, 1).reshape(ranks * local, count, width)
    return all_to_all(group, outgoing.contiguous())  # rank order is expert order


def gather_experts(weight: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All experts' weights on every process; backward sums each expert's gradient at its holder.

    Args:
        weight: [E / R, ...], the experts of this process.
        group: the expert-parallel group, of size R.

    Returns:
        [E, ...]
    """
    if group is None or dist.get_world_size(group) == 1:
        return weight
    return gather_from_sequence_parallel_region(weight, tensor_parallel_output_grad=True, group=group)
