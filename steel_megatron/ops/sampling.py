"""From the logits of a next token to the distribution that it is drawn from; in transformers' order and conventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steel_megatron.config import Sampling


def processed(logits: torch.Tensor, seen: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """The logits that a token is drawn from, or whose largest is taken.

    Args:
        logits: float32 [V].
        seen: ids of the text so far.
        sampling: the settings.

    Returns:
        float32 [V], -inf where a token cannot be chosen.
    """
    if sampling.repetition_penalty != 1 and seen:
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        values = logits[ids]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        unlikely[-1] = False
        logits = logits.masked_fill(unlikely.scatter(0, order, unlikely), float("-inf"))
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    return logits


def choose(logits: torch.Tensor, seen: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits: float32 [V].
        seen: ids of the text so far.
        sampling: the settings.
        generator: what draws.
    """
    logits = processed(logits, seen, sampling)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
