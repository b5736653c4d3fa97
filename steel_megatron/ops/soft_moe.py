"""Soft-MoE routing: what the model calls. Picks the compiled kernels where they fit, else the reference.

Notation as in :mod:`steel_megatron.ops.reference`. Every function is differentiable in its tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from steel_megatron.errors import ConfigError
from steel_megatron.log import get_logger
from steel_megatron.ops import kernels, reference

logger = get_logger(__name__)


@dataclass(frozen=True)
class Routing:
    """What :func:`dispatch` hands to :func:`combine`.

    Attributes:
        logits: [B, T, S] in float32 or wider.
        block_of_token: int64 [T], which block's slots each token reads.
    """

    logits: torch.Tensor
    block_of_token: torch.Tensor


@functools.cache
def _say_once_that_kernels_are_missing() -> None:
    logger.info("routing runs on the PyTorch reference: the compiled extension is not there (pip install . builds it)")


def _backend(x: torch.Tensor) -> object:
    """The module whose ``dispatch`` and ``combine`` compute ``x``."""
    if not kernels.available():
        _say_once_that_kernels_are_missing()
        return reference
    return kernels if kernels.supports(x) else reference


@functools.lru_cache(maxsize=64)
def _plan(length: int, block_length: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Refresh points and each token's block; one block over everything for no block length."""
    if block_length is None:
        refresh, blocks = [length], [0] * length
    else:
        refresh = reference.refresh_points(length, block_length)
        blocks = reference.block_of_token(length, refresh)
    return torch.tensor(refresh, device=device), torch.tensor(blocks, device=device)


def _check(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, mix: str) -> None:
    if x.dim() != 3 or phi.dim() != 3 or x.size(2) != phi.size(0) or x.size(1) < 1:
        raise ConfigError(
            f"routing needs tokens [B, T >= 1, d] and phi [d, experts, slots]; got {list(x.shape)} "
            f"and {list(phi.shape)}"
        )
    if scale.numel() != 1:
        raise ConfigError(f"the routing scale is one number; got a tensor of {list(scale.shape)}")
    if mix not in ("normalized", "raw"):
        raise ConfigError(f"routing mix is {mix!r}; it must be normalized or raw")


def dispatch(
    x: torch.Tensor,
    phi: torch.Tensor,
    scale: torch.Tensor,
    *,
    mode: str | None,
    mix: str,
    block_length: int | None = None,
) -> tuple[torch.Tensor, Routing]:
    """Mix tokens into the slots of the experts.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P] directions of the slots' keys.
        scale: [1] length of the keys.
        mode: ``sequence`` (one set of slots over all tokens, not causal) or ``block_causal``.
        mix: ``raw`` mixes the tokens, ``normalized`` the tokens scaled to length 1.
        block_length: tokens between two refreshes in ``block_causal``.

    Returns:
        slots [B, blocks, E, P, d], and what :func:`combine` needs.

    Raises:
        ConfigError: an argument's value or shape is wrong.
    """
    _check(x, phi, scale, mix)
    if mode == "sequence":
        block_length = None
    elif mode != "block_causal":
        raise ConfigError(f"routing mode {mode!r} has no slots; dispatch takes sequence or block_causal")
    elif block_length is None or block_length < 1:
        raise ConfigError(f"block_length is {block_length}; block_causal needs at least 1 token per block")
    refresh, blocks = _plan(x.size(1), block_length, x.device)
    keys = reference.slot_keys(phi, scale)
    slots, logits, _ = _backend(x).dispatch(x, keys, refresh, mix == "normalized")  # type: ignore[attr-defined]
    return slots.unflatten(2, phi.shape[1:]), Routing(logits, blocks)


def combine(expert_outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Give every token its convex combination of the slots' results.

    Args:
        expert_outputs: [B, blocks, E, P, d], shaped as the slots.
        routing: from :func:`dispatch`.

    Returns:
        [B, T, d] in the type of ``expert_outputs``.
    """
    outputs = expert_outputs.flatten(2, 3)
    backend = _backend(outputs)
    return backend.combine(outputs, routing.logits, routing.block_of_token)  # type: ignore[attr-defined]


def expert_weights(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How much every token gets from each expert (its slots taken together): [B, T, d] to [B, T, E].

    In float32 or wider; sums to 1 over the experts. This is all that mode ``token`` needs of routing.
    """
    _check(x, phi, scale, "raw")
    logits = reference.unit(reference.wide(x)) @ reference.slot_keys(phi, scale)
    return logits.softmax(-1).unflatten(-1, phi.shape[1:]).sum(-1)


def merge_weights(
    x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, *, mix: str, block_length: int
) -> torch.Tensor:
    """The share of each expert in each segment's merged expert (Lory, arXiv 2405.03133, section 3.2).

    Segment s is computed with the routing of the mean token of segment s - 1, so nothing depends on a later token.
    The first segment has nothing before it; it takes the routing of its first token, where Lory takes its own mean
    without gradient: that would let its tokens see later ones.

    Args:
        x: [B, T, d] tokens.
        phi: [d, E, P].
        scale: [1].
        mix: what the mean is taken of: ``raw`` tokens, or ``normalized`` ones.
        block_length: tokens of a segment; the last one may be shorter.

    Returns:
        [B, segments, E] in float32 or wider; sums to 1 over the experts.
    """
    _check(x, phi, scale, mix)
    if block_length < 1:
        raise ConfigError(f"block_length is {block_length}; a segment needs at least 1 token")
    tokens = reference.wide(x)
    mixed = reference.unit(tokens) if mix == "normalized" else tokens
    whole = (x.size(1) - 1) // block_length  # segments that another one follows
    means = mixed[:, : whole * block_length].unflatten(1, (whole, block_length)).mean(2) if whole else mixed[:, :0]
    return expert_weights(torch.cat((mixed[:, :1], means), dim=1), phi, scale)


def mixed_tokens(x: torch.Tensor, mix: str) -> torch.Tensor:
    """What enters the experts: the tokens, or the tokens scaled to length 1; in the type of ``x``."""
    return reference.unit(reference.wide(x)).to(x.dtype) if mix == "normalized" else x
