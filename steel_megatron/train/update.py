"""The update of the weights in as few passes over memory as there are: clipping and AdamW in one.

megatron-core takes apex's or transformer-engine's AdamW where they are, which are fused; elsewhere torch's, by a
sequence of operations that each read and write whole tensors. torch's fused one computes the same in one pass, on CPUs
as well, and divides the gradients by a number on the way: clipping costs no pass of its own.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from steel_megatron.train.optimizer_state import COUNTS_PER_PARAMETER, optimizers_of


def fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW compute its update in one pass.

    Args:
        optimizer: the run's; parts of apex and transformer-engine stay as they are.
    """
    for part in optimizers_of(optimizer):
        if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradients and update the weights.

    Args:
        optimizer: the run's, with its gradients ready; they hold the clipped ones afterwards.
        grad_norm: their global norm, before clipping.
    """
    for part in optimizers_of(optimizer):
        limit, parameters = part.config.clip_grad, part.get_parameters()
        if limit <= 0.0 or not parameters:
            continue
        if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
            # torch's fused optimizers read this attribute, as torch.amp sets it; it is no argument.
            vars(part.optimizer)["grad_scale"] = _divisor(limit, grad_norm, parameters[0].device)
        else:
            own = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, limit, grad_norm, own)
    optimizer.step_with_ready_grads()


def _divisor(limit: float, norm: float, device: torch.device) -> torch.Tensor | None:
    """What clipping divides gradients by, as megatron-core and torch define it; None where they stay."""
    divisor = (norm + 1.0e-6) / limit
    return torch.tensor(divisor, dtype=torch.float32, device=device) if divisor > 1.0 else None
