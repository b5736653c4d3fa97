"""Autograd collectives on slots, and on tokens where a dense layer needs them.

Slots are sent, not tokens: expert parallelism sends each expert's slots to the process that holds the expert
and brings the results back. Sizes are equal and known beforehand, so no counts are exchanged and nothing is
dropped.

What every process computes from its own tokens is a part of one loss, the sum over processes; a gradient that is
complete only after a sum over processes is called partial here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)


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
    local, total, width = results.shape
    count = total // ranks
    outgoing = results.view(local, ranks, count, width).transpose(0, 1).reshape(ranks * local, count, width)
    return all_to_all(group, outgoing.contiguous())  # rank order is expert order


def gather_parts(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every process's part on every process, in rank order: [...] to [R, ...].

    Each may use all parts for something else: backward sums the partial gradients of a part at its owner
    (reduce-scatter), which moves as much as the way here.
    """
    return gather_from_sequence_parallel_region(part.unsqueeze(0), tensor_parallel_output_grad=True, group=group)


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all processes before matrices that are cut over the same processes: [E, N, d] to [E, R * N, d].

    Backward sums the partial gradients of a process's rows at the process (reduce-scatter).
    """
    by_row = rows.transpose(0, 1).contiguous()
    return gather_from_sequence_parallel_region(by_row, tensor_parallel_output_grad=True, group=group).transpose(0, 1)


def scatter_sums(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back of :func:`gather_rows`: partial results [E, R * N, d] to sums of this process's rows [E, N, d]."""
    by_row = partial.transpose(0, 1).contiguous()
    return reduce_scatter_to_sequence_parallel_region(by_row, group=group).transpose(0, 1)


def gather_copies(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All processes' entries [n, ...] before a computation that each of them does on all: [R * n, ...].

    The gradient of the result is the same on all, and complete; backward takes the process's own part of it.
    """
    return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=False, group=group)


def own_part(copies: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back of :func:`gather_copies`: [R * n, ...] to [n, ...]; backward gathers the gradients of all parts."""
    return scatter_to_sequence_parallel_region(copies, group=group)


class _SumBothWays(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """The sum of all processes' tensors, on each.

        Args:
            ctx: autograd's context.
            partial: [...], what this process adds.
            group: the processes.
        """
        ctx.group = group
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_both_ways(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of all processes' tensors, on each; for results whose gradient is partial on each."""
    total: torch.Tensor = _SumBothWays.apply(partial, group)
    return total


class _SumGradients(torch.autograd.Function):
    """The same forward, a sum over processes backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """``x`` unchanged.

        Args:
            ctx: autograd's context.
            x: [...], the same on all processes.
            group: the processes whose gradients are summed.
        """
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradients(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What all processes have before matrices that are cut over them; backward sums their partial gradients.

    megatron-core's copy_to_tensor_model_parallel_region does not sum a gradient that does not lie contiguous in memory:
    it reduces a copy and returns the gradient as it was.
    """
    if group.size() == 1:
        return x
    same: torch.Tensor = _SumGradients.apply(x, group)
    return same
