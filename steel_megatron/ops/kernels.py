"""The compiled kernels (csrc/) as differentiable functions, with the signatures of :mod:`steel_megatron.ops.reference`.

The extension registers four operators with torch, ``torch.ops.steel_megatron.soft_moe_{dispatch,combine}`` and their
backward passes; here they get what torch.compile and autograd need: shapes without data, and gradients (the formulas
are beside the code, in csrc/). Notation as in the reference.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from steel_megatron.log import get_logger

logger = get_logger(__name__)

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def available() -> bool:
    """Whether the compiled extension is there and can be loaded; registers its operators."""
    if importlib.util.find_spec("steel_megatron._C") is None:
        return False
    try:
        importlib.import_module("steel_megatron._C")
    except ImportError as error:
        logger.warning(
            f"the compiled extension does not load ({error}); it was built for another torch or Python than this "
            f"(torch {torch.__version__}). Build it again: pip install --force-reinstall --no-deps ."
        )
        return False
    _register()
    return True


@functools.cache
def _with_cuda() -> bool:
    return bool(importlib.import_module("steel_megatron._C").WITH_CUDA)


def supports(x: Tensor) -> bool:
    """Whether the kernels compute tensors of this type and on this device."""
    on_device = x.device.type == "cpu" or (x.device.type == "cuda" and _with_cuda())
    return available() and x.dtype in TYPES and on_device


def dispatch(
    x: Tensor, keys: Tensor, starts: Tensor, ends: Tensor, mix_normalized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix tokens into slots; differentiable in ``x`` and ``keys``, once.

    Args:
        x: [B, T, d] tokens, float32, bfloat16 or float16.
        keys: [d, S], the slots' keys.
        starts: int64 [B or 1, R], the first token that each block's slots are a mean over.
        ends: int64 [B or 1, R], the token after the last. Both ascend; a block either goes on from the one before (the
            same start) or starts at or after its end.
        mix_normalized: mix tokens scaled to length 1, not the tokens.

    Returns:
        slots [B, R, S, d] in the type of ``x``, 0 where a block is empty; logits [B, T, S] in float32; log-sum-exp
        [B, R, S] of the logits over each block's tokens in float32, minus infinity where it is empty.
    """
    slots, logits, lse = torch.ops.steel_megatron.soft_moe_dispatch(x, keys.float(), starts, ends, mix_normalized)
    return slots.to(x.dtype), logits, lse


def combine(outputs: Tensor, logits: Tensor, block_of_token: Tensor) -> Tensor:
    """Give every token its mean of the slots' results; differentiable in ``outputs`` and ``logits``, once.

    Args:
        outputs: [B, R, S, d], what the experts made of the slots, float32, bfloat16 or float16.
        logits: [B, T, S] from :func:`dispatch`.
        block_of_token: int64 [B or 1, T], ascending: which of the R blocks each token reads.

    Returns:
        [B, T, d] in the type of ``outputs``.
    """
    y: Tensor = torch.ops.steel_megatron.soft_moe_combine(outputs, logits.float(), block_of_token)
    return y


def _dispatch_shapes(
    x: Tensor, keys: Tensor, starts: Tensor, ends: Tensor, mix_normalized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    slots, blocks = keys.size(1), ends.size(1)
    return (
        x.new_empty((batch, blocks, slots, width), dtype=torch.float32),
        x.new_empty((batch, length, slots), dtype=torch.float32),
        x.new_empty((batch, blocks, slots), dtype=torch.float32),
    )


def _dispatch_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, keys, starts, ends, ctx.mix_normalized = inputs
    ctx.save_for_backward(x, keys, starts, ends, *output)


def _dispatch_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    x, keys, starts, ends, slots, logits, lse = ctx.saved_tensors
    grad_x, grad_keys = torch.ops.steel_megatron.soft_moe_dispatch_backward(
        *gradients, x, keys, starts, ends, ctx.mix_normalized, slots, logits, lse
    )
    return grad_x, grad_keys, None, None, None


def _combine_shapes(outputs: Tensor, logits: Tensor, block_of_token: Tensor) -> Tensor:
    return outputs.new_empty((outputs.size(0), logits.size(1), outputs.size(3)))


def _combine_save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_outputs, grad_logits = torch.ops.steel_megatron.soft_moe_combine_backward(grad_y, *ctx.saved_tensors)
    return grad_outputs, grad_logits, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "the routing kernels are differentiable once; for second derivatives call steel_megatron.ops.reference"
    )


def _register() -> None:
    """Give the operators shapes and gradients."""
    name = "steel_megatron::soft_moe_"
    torch.library.register_fake(name + "dispatch", _dispatch_shapes)
    torch.library.register_autograd(name + "dispatch", _dispatch_backward, setup_context=_dispatch_save)
    torch.library.register_fake(name + "combine", _combine_shapes)
    torch.library.register_autograd(name + "combine", _combine_backward, setup_context=_combine_save)
    for backward in ("dispatch_backward", "combine_backward"):
        torch.library.register_autograd(name + backward, _refuse, setup_context=_keep_nothing)

    @torch.library.register_fake(name + "dispatch_backward")
    def _(
        grad_slots: Tensor, grad_logits: Tensor, grad_lse: Tensor, x: Tensor, keys: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=torch.contiguous_format), keys.new_empty(keys.shape)

    @torch.library.register_fake(name + "combine_backward")
    def _(grad_y: Tensor, outputs: Tensor, logits: Tensor, block_of_token: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.new_empty(outputs.shape), logits.new_empty(logits.shape)
