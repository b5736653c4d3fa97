"""Decoding with a cache, held to the full forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steel_megatron.audit.report import Difference, blocks_of
from steel_megatron.config import ModelConfig
from steel_megatron.hf.modeling_steel import CACHE, SteelForCausalLM

DECODED = 24
"""Tokens that are decoded one at a time after a prompt."""


def prompts_for(model: ModelConfig, length: int) -> tuple[int, ...]:
    """Prompts that end inside a block and shortly before an edge, so that decoding passes it."""
    block = blocks_of(model) or DECODED
    wanted = {block // 2, block - 2, block + block // 2, 2 * block - 2} if model.causal else {block}
    return tuple(sorted({min(max(1, prompt), length - 1) for prompt in wanted}))


def cached_decoding(exported: SteelForCausalLM, ids: torch.Tensor, prompts: Sequence[int]) -> Difference:
    """Decode token by token after each prompt, the second row padded on the left, and compare with the full forward.

    Args:
        exported: a causal model in its exported form.
        ids: int64 [B >= 2, T] token ids.
        prompts: lengths of the prompts, less than T. Up to ``DECODED`` tokens are decoded after each.

    Returns:
        The difference of the logits at all real tokens, those of the prompts included.
    """
    mask = torch.ones_like(ids)
    mask[1, : min(3, ids.size(1) - 2)] = 0
    full = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cached, expected = [], []
    for prompt in prompts:
        end = min(prompt + DECODED, ids.size(1))
        out = exported(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
        logits = [out.logits]
        for position in range(prompt, end):
            out = exported(
                input_ids=ids[:, position : position + 1],
                attention_mask=mask[:, : position + 1],
                use_cache=True,
                **{CACHE: out[CACHE]},
            )
            logits.append(out.logits)
        real = mask[:, :end].bool()
        cached.append(torch.cat(logits, 1)[real])
        expected.append(full[:, :end][real])
    return difference(cached, expected)


def published_decoding(exported: SteelForCausalLM, ids: torch.Tensor, prompts: Sequence[int]) -> Difference:
    """What becomes of a model that is not causal when it decodes with attention's cache.

    As the published code does it: the cache holds keys and values of the tokens so far, and routing sees only the
    new token, a sequence of one. Against the full forward on the text up to that token.

    Args:
        exported: a model in its exported form; its settings are changed and restored.
        ids: int64 [B, T] token ids, without padding.
        prompts: lengths of the prompts, less than T. Up to ``DECODED`` tokens are decoded after each.

    Returns:
        The difference of the logits at the decoded tokens.
    """
    # The settings decide whether there is a cache, each layer's own mode how it routes.
    mode = exported.config.routing_mode
    exported.config.routing_mode = "token"
    cached, expected = [], []
    try:
        for prompt in prompts:
            out = exported(input_ids=ids[:, :prompt], use_cache=True)
            for position in range(prompt, min(prompt + DECODED, ids.size(1))):
                one = ids[:, position : position + 1]
                out = exported(input_ids=one, use_cache=True, **{CACHE: out[CACHE]})
                cached.append(out.logits[:, -1])
                expected.append(exported(input_ids=ids[:, : position + 1], use_cache=False).logits[:, -1])
    finally:
        exported.config.routing_mode = mode
    return difference(cached, expected)


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Difference:
    """Of logits [..., V], in equally shaped pieces."""
    a, b = (torch.cat([piece.flatten(0, -2) for piece in pieces]) for pieces in (ours, theirs))
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return Difference(float((a - b).abs().max()), float(b.std()), float(same), len(a))
