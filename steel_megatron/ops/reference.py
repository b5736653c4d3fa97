"""The routing mathematics in plain PyTorch: the specification that every kernel is held to.

Notation (Soft MoE, arXiv 2308.00951, section 2; Steel-LLM, section 3.1):

    B, T, d     sequences, tokens of a sequence, hidden size
    E, P, S     experts, slots per expert, S = E * P slots
    R           blocks: sets of slots, each a mean over tokens starts[k] <= t < ends[k] (:mod:`steel_megatron.ops.plan`)
    u, v        tokens scaled to length 1; what is mixed into slots (u, or the tokens themselves)

All of it is computed in float32, or in float64 if the tokens are.
"""

from __future__ import annotations

import torch

SMALLEST_NORM = 1e-12
LEAST = -1e30  # for softmax over nothing, where minus infinity would give NaN


def upcast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def l2_normalize(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Vectors scaled to length 1; shorter ones than 1e-12 are divided by that."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(SMALLEST_NORM)


def slot_keys(phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The key of every slot: [d, E, P] and [1] to [d, S]."""
    return upcast(scale) * l2_normalize(upcast(phi).flatten(1), dim=0)


def refresh_points(length: int, block_length: int) -> list[int]:
    """Where block_causal makes slots anew: after 1, 2, 4, ... tokens below ``block_length``, then after each block.

    Only points before the end of a sequence of ``length`` tokens count, but the first always does: token 0 has
    nothing before it and reads slots made of itself.
    """
    points, power = [], 1
    while power < block_length:
        points.append(power)
        power *= 2
    points.extend(range(block_length, length, block_length))
    return [point for point in points if point < length] or [1]


def block_of_token(length: int, refresh: list[int]) -> list[int]:
    """Which refresh each token reads: the last one whose mean is over tokens before it (token 0: the first)."""
    block, blocks = 0, []
    for token in range(length):
        while block + 1 < len(refresh) and refresh[block + 1] <= max(token, 1):
            block += 1
        blocks.append(block)
    return blocks


def dispatch(
    x: torch.Tensor, keys: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, mix_normalized: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix tokens into slots.

    Args:
        x: [B, T, d] tokens.
        keys: [d, S] from :func:`slot_keys`.
        starts: int64 [B or 1, R], the first token that each block's slots are a mean over.
        ends: int64 [B or 1, R], the token after the last.
        mix_normalized: mix tokens scaled to length 1, not the tokens.

    Returns:
        slots [B, R, S, d] in the type of ``x``, 0 where a block is empty; logits [B, T, S]; log-sum-exp [B, R, S] of
        the logits over each block's tokens, minus infinity where it is empty.
    """
    tokens = upcast(x)
    normalized = l2_normalize(tokens)
    logits = normalized @ keys
    positions = torch.arange(x.size(1), device=x.device)
    seen = (positions >= starts.to(x.device).unsqueeze(-1)) & (positions < ends.to(x.device).unsqueeze(-1))
    seen = seen.unsqueeze(-1)  # [B or 1, R, T, 1]
    weights = logits.unsqueeze(1).masked_fill(~seen, LEAST).softmax(2) * seen  # [B, R, T, S]
    slots = torch.einsum("brts,btd->brsd", weights, normalized if mix_normalized else tokens)
    lse = logits.unsqueeze(1).masked_fill(~seen, float("-inf")).logsumexp(2)
    return slots.to(x.dtype), logits, lse


def combine(outputs: torch.Tensor, logits: torch.Tensor, block_of_token: torch.Tensor) -> torch.Tensor:
    """Give every token its mean of the slots' results.

    Args:
        outputs: [B, R, S, d], what the experts made of the slots.
        logits: [B, T, S] from :func:`dispatch`.
        block_of_token: int64 [B or 1, T], which of the R blocks each token reads.

    Returns:
        [B, T, d] in the type of ``outputs``.
    """
    weights = logits.softmax(-1)  # [B, T, S]
    blocks = torch.nn.functional.one_hot(block_of_token.to(logits.device), outputs.size(1)).to(weights.dtype)
    blocks = blocks.expand(len(outputs), -1, -1)  # [B, T, R]
    return torch.einsum("bts,btr,brsd->btd", weights, blocks, upcast(outputs)).to(outputs.dtype)
