"""Slots of sequences that several processes share: partial slots are sent and merged, tokens are not.

The slots of a block are a softmax-weighted mean over the tokens of an interval. Cut at the borders of the chunks that
processes hold, it is a mean of the spans' means, weighted by the spans' sums of exponentials (as flash attention merges
its blocks). Of a span, the log-sum-exp z_p of its logits and the mean s_p are all that another process needs: partial
slots, d + 1 numbers for each slot:

    z = log(sum over p of exp(z_p))        s = sum over p of exp(z_p - z) s_p

Every process computes the partial slots of its own spans by the ordinary dispatch, one "block" for each; those that
others need are gathered, and each process merges what the blocks of its own tokens take. In ``block_causal`` that is a
prefix over chunks in the order of the sequence, in ``sequence`` it is all of them; with packed documents, those of the
same document. All of it is autograd on slots, in float32 or wider. docs/parallelism.md has a picture;
:mod:`steel_megatron.model.routing.split_plan` says who computes, sends and merges what.

Legend: B sequences, L tokens of this process in each, S slots, I spans of this process, X of them sent by each process,
R blocks that its tokens read, D sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from steel_megatron.model.routing.split_plan import SplitPlan
from steel_megatron.ops import Routing, reference
from steel_megatron.ops.soft_moe import backend_of


def dispatch_split(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    mix: str,
    plan: SplitPlan,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, Routing]:
    """Mix the tokens of all processes that share sequences into the slots of the blocks that this one's tokens read.

    Sends X * S * (d + 1) numbers for each sequence forward and receives those of all; backward the same.

    Args:
        x: [B, L, d], this process's tokens.
        phi: [d, E, P].
        scale: [1].
        mix: ``raw`` or ``normalized``.
        plan: this process's plan.
        gather: every process's tensor on each, [...] to [ranks, ...], in the order of the plan's split.

    Returns:
        slots [B, R, E, P, d] in the type of ``x``, 0 for blocks that fill up, and what ``combine`` needs. Gradients of
        ``phi`` and ``scale`` are partial: those of the process's own tokens.
    """
    partials, logits = partial_slots(x, phi, scale, mix, plan)
    gathered = gather(select(partials, plan.sent)) if plan.sent.size(1) else None
    slots = merge_partials(partials, gathered, plan)
    return slots.to(x.dtype).unflatten(2, phi.shape[1:]), Routing(logits, plan.block_of_token)


def partial_slots(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, plan: SplitPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The partial slots of a process's own spans, in float32 or wider.

    Args:
        x: [B, L, d], this process's tokens.
        phi: [d, E, P].
        scale: [1].
        mix: ``raw`` or ``normalized``.
        plan: this process's plan.

    Returns:
        [B, I + 1, S, d + 1], mean and log-sum-exp of the plan's spans and of one that is empty; and logits [B, L, S].
    """
    keys = reference.slot_keys(phi, scale)
    tokens = reference.upcast(x)  # so that slots come in float32 as well
    means, logits, lse = backend_of(tokens).dispatch(tokens, keys, plan.starts, plan.ends, mix == "normalized")
    return F.pad(torch.cat((means, lse.unsqueeze(-1)), dim=-1), (0, 0, 0, 0, 0, 1)), logits


def merge_partials(partials: torch.Tensor, gathered: torch.Tensor | None, plan: SplitPlan) -> torch.Tensor:
    """The slots of a process's blocks.

    Args:
        partials: [B, I + 1, S, d + 1], what this process computed.
        gathered: [ranks, B, X, S, d + 1], what all processes send; None if that is nothing.
        plan: this process's plan.

    Returns:
        [B, R, S, d]
    """
    nothing = partials.size(1) - 1
    own, own_exists = select(partials, plan.own_span), plan.own_span != nothing
    if gathered is None:
        return own[..., :-1] * own_exists[..., None, None]
    of_sets = _merge(gathered.transpose(0, 1).flatten(1, 2), plan.sets)
    pairs = torch.stack((own, select(of_sets, plan.set_of_block)), dim=2).flatten(0, 1)  # [B * R, 2, S, d + 1]
    exist = torch.stack((own_exists, plan.set_of_block != 0), dim=-1).expand(len(partials), -1, -1)
    return _merge(pairs, exist.flatten(0, 1).unsqueeze(1)).view(own.shape)[..., :-1]


def select(partials: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, Q, ...] to [B, M, ...], those with these numbers in each sequence; index [N, M], N is 1 or B."""
    if len(index) == 1:
        return partials[:, index[0]]
    return partials[torch.arange(len(partials), device=partials.device).unsqueeze(1), index]


def _merge(partials: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Merge sets of partial slots.

    Args:
        partials: [B, Q, S, d + 1], mean and log-sum-exp of each.
        sets: bool [B or 1, D, Q], the members of each set.

    Returns:
        [B, D, S, d + 1]: mean and log-sum-exp of each set; for an empty one 0 and less than any logit.
    """
    means, lse = partials[..., :-1], partials[..., -1]
    members = sets.unsqueeze(-1)
    # Spans outside the set may be empty, with minus infinity: they must not get into softmax or its gradient.
    lse_of_members = torch.where(members, lse.unsqueeze(1), reference.LEAST)  # [B, D, Q, S]
    weights = lse_of_members.softmax(2) * members
    merged = torch.einsum("bdqs,bqsc->bdsc", weights, means)
    return torch.cat((merged, lse_of_members.logsumexp(2).unsqueeze(-1)), dim=-1)
