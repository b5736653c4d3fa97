"""Soft-MoE routing: what the model calls. Picks the compiled kernels where they fit, else the reference.

Notation as in :mod:`steel_megatron.ops.reference`. Every function is differentiable in its tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch

from steel_megatron.errors import ConfigError
from steel_megatron.log import get_logger
from steel_megatron.ops import kernels, reference
from steel_megatron.ops.plan import BlockPlan, SegmentPlan, block_plan, check_document_starts, segment_plan

logger = get_logger(__name__)


@dataclass(frozen=True)
class Routing:
    """What :func:`dispatch` hands to :func:`combine`.

    Attributes:
        logits: [B, T, S] in float32 or wider.
        block_of_token: int64 [B or 1, T], which block's slots each token reads; None in mode ``token``, where each
            token has slots of its own.
    """

    logits: torch.Tensor
    block_of_token: torch.Tensor | None


@functools.cache
def _say_once_that_kernels_are_missing() -> None:
    logger.info("routing runs on the PyTorch reference: the compiled extension is not there (pip install . builds it)")


def backend_of(x: torch.Tensor) -> ModuleType:
    """The module whose ``dispatch`` and ``combine`` compute ``x``: the kernels where they fit, else the reference."""
    if not kernels.available():
        _say_once_that_kernels_are_missing()
        return reference
    return kernels if kernels.supports(x) else reference


def _check(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str) -> None:
    if x.dim() != 3 or phi.dim() != 3 or x.size(2) != phi.size(0) or 0 in (x.size(1), *phi.shape):
        raise ConfigError(
            f"routing needs tokens [B, T >= 1, d >= 1] and phi [d, experts >= 1, slots >= 1]; got {list(x.shape)} "
            f"and {list(phi.shape)}"
        )
    if scale.numel() != 1:
        raise ConfigError(f"the routing scale is one number; got a tensor of {list(scale.shape)}")
    for name, tensor in (("the tokens", x), ("phi", phi), ("the scale", scale)):
        if not tensor.dtype.is_floating_point:
            raise ConfigError(f"routing computes with floating point numbers; {name} are {tensor.dtype}")
        if tensor.device != x.device:
            raise ConfigError(
                f"routing needs its tensors on one device; the tokens are on {x.device}, {name} on {tensor.device}"
            )
    if mix not in ("normalized", "raw"):
        raise ConfigError(f"routing mix is {mix!r}; it must be normalized or raw")


def dispatch(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    mode: str = "sequence",
    mix: str = "normalized",
    block_length: int | None = None,
    document_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """Mix tokens into the slots of the experts.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P] directions of the slots' keys.
        scale: [1] length of the keys.
        mode: ``sequence`` (one set of slots over all tokens of a document, not causal), ``block_causal``, or ``token``
            (every token is its own slots).
        mix: ``raw`` mixes the tokens, ``normalized`` (as in the published weights) the tokens scaled to length 1.
        block_length: tokens between two refreshes in ``block_causal``.
        document_starts: int64 [B, T], for each token the position of the first token of its document, where sequences
            hold several; nothing passes from one document to another.

    Returns:
        slots [B, blocks, E, P, d], and what :func:`combine` needs. ``sequence`` has a block for every document,
        ``block_causal`` for every refresh, ``token`` for every token (a view: nothing is copied).

    Raises:
        ConfigError: an argument's value or shape is wrong.
    """
    _check(x, phi, scale, mix)
    if document_starts is not None:
        check_document_starts(document_starts, *x.shape[:2])
    if mode == "token":
        slots = mixed_tokens(x, mix)[:, :, None, None].expand(-1, -1, *phi.shape[1:], -1)
        return slots, Routing(_logits(x, phi, scale), None)
    if mode not in ("sequence", "block_causal"):
        raise ConfigError(f"routing mode is {mode!r}; slots are there in sequence, block_causal and token")
    if mode == "block_causal" and (block_length is None or block_length < 1):
        raise ConfigError(f"block_length is {block_length}; block_causal needs at least 1 token per block")
    plan = block_plan(x.size(1), block_length if mode == "block_causal" else None, x.device, document_starts)
    return dispatch_blocks(x, phi, scale, mix, plan)


def dispatch_blocks(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, plan: BlockPlan
) -> tuple[torch.Tensor, Routing]:
    """:func:`dispatch` by a given plan, for layers that share one.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P] directions of the slots' keys.
        scale: [1] length of the keys.
        mix: ``raw`` or ``normalized``.
        plan: the blocks of these sequences.

    Returns:
        slots [B, R, E, P, d] in the type of ``x``, 0 where a block is empty, and what :func:`combine` needs.
    """
    keys = reference.slot_keys(phi, scale)
    slots, logits, _ = backend_of(x).dispatch(x, keys, plan.starts, plan.ends, mix == "normalized")
    return slots.unflatten(2, phi.shape[1:]), Routing(logits, plan.block_of_token)


def combine(expert_outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Give every token its convex combination of the slots' results.

    Args:
        expert_outputs: [B, blocks, E, P, d], shaped as the slots.
        routing: from :func:`dispatch`.

    Returns:
        [B, T, d] in the type of ``expert_outputs``.

    Raises:
        ConfigError: the outputs' shape, type or device does not fit the routing.
    """
    batch, length, slots = routing.logits.shape
    shape = expert_outputs.shape
    if expert_outputs.dim() != 5 or shape[0] != batch or shape[2] * shape[3] != slots:
        raise ConfigError(
            "combine needs the experts' outputs shaped as their slots, [B, blocks, experts, slots, d], for the routing "
            f"of [B, T, experts * slots] = {[batch, length, slots]}; got {list(shape)}"
        )
    if not expert_outputs.dtype.is_floating_point or expert_outputs.device != routing.logits.device:
        raise ConfigError(
            f"the experts' outputs are {expert_outputs.dtype} on {expert_outputs.device}; they must be floating point "
            f"numbers on {routing.logits.device}, where the routing is"
        )
    outputs = expert_outputs.flatten(2, 3)
    if routing.block_of_token is None:
        weights = routing.logits.softmax(-1).unsqueeze(2)  # [B, T, 1, S]
        return (weights @ reference.upcast(outputs)).squeeze(2).to(outputs.dtype)
    y: torch.Tensor = backend_of(outputs).combine(outputs, routing.logits, routing.block_of_token)
    return y


def _logits(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[B, T, S] in float32 or wider."""
    return reference.l2_normalize(reference.upcast(x)) @ reference.slot_keys(phi, scale)


def expert_weights(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How much every token gets from each expert. This is all that mode ``token`` needs of routing.

    The combine weights of Soft MoE (arXiv 2308.00951, section 2.1), summed over the slots of an expert.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P] directions of the slots' keys.
        scale: [1] length of the keys.

    Returns:
        [B, T, E] in float32 or wider; sums to 1 over the experts.

    Raises:
        ConfigError: an argument's shape, type or device is wrong.
    """
    _check(x, phi, scale, "raw")
    return _logits(x, phi, scale).softmax(-1).unflatten(-1, phi.shape[1:]).sum(-1)


def merge_weights(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    *,
    mix: str,
    block_length: int,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The share of each expert in each segment's merged expert (Lory, arXiv 2405.03133, section 3.2).

    Segment s is computed with the routing of the mean token of segment s - 1, so nothing depends on a later token.
    The first segment of a document has nothing before it; it takes the routing of its first token, where Lory takes
    its own mean without gradient: that would let its tokens see later ones.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P].
        scale: [1].
        mix: what the mean is taken of: ``raw`` tokens, or ``normalized`` ones.
        block_length: tokens of a segment; the last one of a document may be shorter.
        document_starts: int64 [B, T], for each token the position of the first token of its document, where sequences
            hold several; segments begin anew with each, as in :func:`~steel_megatron.ops.plan.segment_plan`.

    Returns:
        [B, segments, E] in float32 or wider; sums to 1 over the experts. With documents, rows with fewer segments than
        others are filled up with zeros.
    """
    _check(x, phi, scale, mix)
    if block_length < 1:
        raise ConfigError(f"block_length is {block_length}; a segment needs at least 1 token")
    if document_starts is not None:
        check_document_starts(document_starts, *x.shape[:2])
        plan = segment_plan(document_starts.to(x.device), block_length)
        shares = merge_weights_of_documents(x, phi, scale, mix, plan)
        return shares.new_zeros(*plan.real.shape, shares.size(-1)).masked_scatter(plan.real.unsqueeze(-1), shares)
    mixed = mixed_tokens(reference.upcast(x), mix)
    whole = (x.size(1) - 1) // block_length  # segments that another one follows
    means = mixed[:, : whole * block_length].unflatten(1, (whole, block_length)).mean(2) if whole else mixed[:, :0]
    return expert_weights(torch.cat((mixed[:, :1], means), dim=1), phi, scale)


def merge_weights_of_documents(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str, plan: SegmentPlan
) -> torch.Tensor:
    """:func:`merge_weights` by a given plan, for layers that share one.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P] directions of the slots' keys.
        scale: [1] length of the keys.
        mix: what the mean is taken of: ``raw`` tokens, or ``normalized`` ones.
        plan: the segments of these sequences, M of them.

    Returns:
        [M, E] in float32 or wider; sums to 1 over the experts.
    """
    segments = plan.to_segments(mixed_tokens(reference.upcast(x), mix))
    means = segments.sum(1) / plan.lengths[plan.real].unsqueeze(-1)
    # A segment that follows another one is never the first of its row, so the one before is the one in the list before.
    vectors = torch.where(plan.follows[plan.real].unsqueeze(-1), means.roll(1, 0), segments[:, 0])
    return expert_weights(vectors.unsqueeze(0), phi, scale).squeeze(0)


def mixed_tokens(x: torch.Tensor, mix: str) -> torch.Tensor:
    """What enters the experts: the tokens, or the tokens scaled to length 1; in the type of ``x``."""
    return reference.l2_normalize(reference.upcast(x)).to(x.dtype) if mix == "normalized" else x
