"""Experts merged per segment: one weighted sum of the experts' matrices for each segment, then that one expert.

SMEAR (arXiv 2306.03745) merges experts' parameters by their routing weights; Lory (arXiv 2405.03133, section 3) does it
segment by segment. With E experts whose way up (or down) is one matrix W_e [out, in], segment m with its shares w_me
computes

    Theta_m = sum_e w_me W_e           y_m = x_m Theta_m^T
    dx_m = dy_m Theta_m                dTheta_m = dy_m^T x_m
    dW_e = sum_m w_me dTheta_m         dw_me = <dTheta_m, W_e>

The matrices Theta of all segments are far larger than the experts: 128 segments of Steel-LLM's layer are 6.5 GB in
float32. So they are made for a chunk of segments at a time, by one matrix product, into memory that the next chunk uses
again; nothing is kept for the backward pass, which makes them anew. Making them costs 2 E operations per parameter and
segment, using them 2 N: little, once a segment has more tokens than there are experts.

Legend: M segments of N tokens (short ones padded with zeros, which stay zeros and give no gradient), E experts over all
processes, R expert-parallel processes, n parameters of a matrix on one tensor-parallel process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bound of the memory for merged matrices: 20 segments of a matrix of Steel-LLM's experts in bfloat16.
CHUNK_BYTES = 256 * 2**20
# Fewer are taken where more gain nothing. Every chunk reads all experts once, so it shall have twice as many segments
# as there are experts; but of small matrices up to this size, for a chunk costs time of its own.
ENOUGH_BYTES = 32 * 2**20
# Gradients of merged matrices in bfloat16 are widened this many numbers at a time: as many as stay in a CPU's cache; as
# few as fill a GPU.
SLICE_ON_CPU, SLICE = 2**20, 2**25


def swiglu(pair: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value: [..., 2 n], gate and value side by side, to [..., n]."""
    gate, value = pair.chunk(2, dim=-1)
    return F.silu(gate) * value


def sums_are_sent(segments: int, experts: int, ranks: int) -> bool:
    """Whether merging at the holders of the experts moves less than gathering the experts: M R < E.

    Both costs are given in :func:`steel_megatron.model.experts.merged_experts`; that of the shares is left out.

    Args:
        segments: M, on this process.
        experts: E, over all processes.
        ranks: R, processes that share the experts.
    """
    return ranks > 1 and segments * ranks < experts


def merged_linear(
    x: torch.Tensor,
    shares: torch.Tensor,
    weight: torch.Tensor,
    ep_group: dist.ProcessGroup | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """[M, N, in] to [M, N, out]: every segment by its own sum of the experts' matrices.

    Args:
        x: tokens.
        shares: [1, M, E], shares of all experts in this process's segments: experts are sent. Or [R, M, E / R], shares
            of this process's experts in the segments of each process of the group: sums are sent.
        weight: [E / R, out, in], in the type of ``x``.
        ep_group: the processes that share the experts.
        chunk_bytes: bound of the memory for merged matrices.
    """
    assert x.dtype == weight.dtype, f"tokens are {x.dtype}, experts {weight.dtype}"
    # Where sums are sent, a process holds those of all R processes' segments and what it receives.
    copies = shares.size(0) + 1 if shares.size(0) > 1 else 1
    each = copies * weight[0].numel() * weight.element_size()
    enough = max(2 * shares.size(2), ENOUGH_BYTES // each)
    at_once = max(1, min(chunk_bytes // each, enough))
    y: torch.Tensor = _MergedLinear.apply(x, shares, weight, ep_group, at_once)
    return y


class _MergedLinear(torch.autograd.Function):
    """:func:`merged_linear`, in chunks of ``at_once`` segments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shares: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup | None,
        at_once: int,
    ) -> torch.Tensor:
        """Merge and multiply, one chunk of segments after the other.

        Args:
            ctx: autograd's context.
            x: [M, N, in] tokens.
            shares: [1, M, E], or [R, M, E / R] where sums are sent.
            weight: [E / R, out, in], in the type of ``x``.
            group: the processes that share the experts; None where each has all of them.
            at_once: segments of the largest chunk.

        Returns:
            [M, N, out]
        """
        ctx.save_for_backward(x, shares, weight)
        ctx.group, ctx.at_once = group, at_once
        experts = _SharedExperts(weight, shares, group, min(at_once, x.size(0)))
        y = x.new_empty(*x.shape[:2], weight.size(1))
        for rows in _chunks(x.size(0), at_once):
            torch.bmm(x[rows], experts.merge(rows).mT, out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, shares, weight = ctx.saved_tensors
        needs_x, needs_shares, needs_weight, _, _ = ctx.needs_input_grad
        experts = _SharedExperts(weight, shares, ctx.group, min(ctx.at_once, x.size(0)))
        grad_x = torch.empty_like(x) if needs_x else None
        for rows in _chunks(x.size(0), ctx.at_once):
            if grad_x is not None:
                torch.bmm(grad_y[rows], experts.merge(rows), out=grad_x[rows])
            if needs_shares or needs_weight:
                grad_merged = experts.chunk(rows)  # in place of the merged matrices
                torch.bmm(grad_y[rows].mT, x[rows], out=grad_merged)
                experts.add_gradient(rows, grad_merged)
        grad_shares = experts.grad_shares.to(shares.dtype) if needs_shares else None
        return grad_x, grad_shares, experts.weight_gradient() if needs_weight else None, None, None


def _chunks(segments: int, at_once: int) -> Iterator[slice]:
    for start in range(0, segments, at_once):
        yield slice(start, min(start + at_once, segments))


class _SharedExperts:
    """One matrix of every expert, merged for chunks of segments, and the sums of its gradient.

    Args:
        weight, shares, group: as :func:`merged_linear` has them.
        at_once: segments of the largest chunk.
    """

    def __init__(
        self, weight: torch.Tensor, shares: torch.Tensor, group: dist.ProcessGroup | None, at_once: int
    ) -> None:
        self.group = group
        self.local = weight  # [E / R, out, in]
        self.sums_are_sent = shares.size(0) > 1
        self.weight = weight.flatten(1) if self.sums_are_sent else _gathered(weight.flatten(1), group)  # [E, n]
        self.shares = shares  # [1, M, E]
        # One piece of memory for all chunks: getting new memory takes longer than filling it.
        self.buffer = weight.new_empty(shares.size(0), at_once, self.weight.size(1))
        self.received = self.buffer.new_empty(self.buffer.shape[1:]) if self.sums_are_sent else self.buffer[0]
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.grad_weight = torch.zeros(0)
        self.grad_shares = torch.zeros(0)

    def chunk(self, rows: slice) -> torch.Tensor:
        """[rows, out, in], memory for the matrices of these segments; there is only one such piece."""
        return self.received[: rows.stop - rows.start].view(-1, *self.local.shape[1:])

    def merge(self, rows: slice) -> torch.Tensor:
        """[rows, out, in], the merged matrices of these segments, in the memory of :meth:`chunk`."""
        shares = self.shares[:, rows].to(self.weight.dtype).flatten(0, 1)
        sums = self.buffer.flatten(0, 1)[: shares.size(0)]
        torch.mm(shares, self.weight, out=sums)
        if self.sums_are_sent:
            dist.reduce_scatter_tensor(self.received[: rows.stop - rows.start], sums, group=self.group)
        return self.chunk(rows)

    def add_gradient(self, rows: slice, grad_merged: torch.Tensor) -> None:
        """Take the gradient of :meth:`merge`'s result into the sums, in float32 or wider."""
        if not self.grad_shares.numel():
            self.grad_weight = torch.zeros_like(self.weight, dtype=self.wide)
            self.grad_shares = torch.zeros_like(self.shares, dtype=self.wide)
        shares = self.shares[:, rows].to(self.wide).flatten(0, 1)
        grad = grad_merged.flatten(1)
        if self.sums_are_sent:
            everyones = self.buffer.flatten(0, 1)[: shares.size(0)]
            dist.all_gather_into_tensor(everyones, grad, group=self.group)
            grad = everyones
        grad_shares = shares.new_zeros(shares.size(1), shares.size(0))  # experts first: BLAS is faster so
        columns = grad.size(1)
        if grad.dtype != self.wide:
            columns = max(1, (SLICE_ON_CPU if grad.device.type == "cpu" else SLICE) // len(grad))
        for start in range(0, grad.size(1), columns):
            piece = slice(start, start + columns)
            part = grad[:, piece].to(self.wide)
            grad_shares.addmm_(self.weight[:, piece].to(self.wide), part.mT)
            self.grad_weight[:, piece].addmm_(shares.mT, part)
        self.grad_shares[:, rows] = grad_shares.mT.unflatten(0, (self.shares.size(0), -1))

    def weight_gradient(self) -> torch.Tensor:
        """[E / R, out, in], the gradient of this process's experts, in their type."""
        grad = self.grad_weight
        if self.group is not None and not self.sums_are_sent:
            grad = grad.new_empty(self.local.size(0), grad.size(1))
            dist.reduce_scatter_tensor(grad, self.grad_weight, group=self.group)
        return grad.to(self.local.dtype).view_as(self.local)


def _gathered(weight: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All experts of the group's processes, in rank order: [E / R, n] to [E, n]."""
    if group is None:
        return weight
    everyones = weight.new_empty(group.size() * weight.size(0), weight.size(1))
    dist.all_gather_into_tensor(everyones, weight.contiguous(), group=group)
    return everyones
