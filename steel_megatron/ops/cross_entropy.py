"""Cross entropy of a few rows of logits, and its gradient in their place: compiled on a CPU, torch elsewhere.

Legend: n tokens, V / R columns of logits, of which those from ``columns`` on are padding and have no probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steel_megatron.ops.kernels import TYPES, available


def _compiled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in TYPES and available()


def statistics(logits: Tensor, labels: Tensor, columns: int) -> Tensor:
    """What the loss of each token is made of.

    Args:
        logits: [n, V / R], contiguous.
        labels: int64 [n], columns; outside of 0 to ``columns`` where the label is not among them.
        columns: how many are not padding.

    Returns:
        float32 [3, n]: log-sum-exp, minus infinity without columns; the label's logit, 0 where it is not here; the sum.
    """
    if _compiled(logits):
        result: Tensor = torch.ops.steel_megatron.cross_entropy_statistics(logits, labels, columns)
        return result
    real = logits[:, :columns].float()
    inside = (labels >= 0) & (labels < columns)
    picked = logits.gather(1, labels.where(inside, 0)[:, None]).squeeze(1).float() * inside
    return torch.stack((torch.logsumexp(real, 1), picked, real.sum(1)))


def gradient_(
    logits: Tensor, labels: Tensor, columns: int, lse: Tensor, factors: Tensor, smoothing: float, vocabulary: int
) -> None:
    """Write the gradient of factor * loss over the logits, loss = lse - (1 - smoothing) picked - smoothing * mean.

    Args:
        logits: [n, V / R], contiguous; the gradient afterwards, 0 in the padding.
        labels: as for :func:`statistics`.
        columns: as for :func:`statistics`.
        lse: float32 [n], log-sum-exp over the columns of all processes.
        factors: float32 [n].
        smoothing: the share of a label's weight that all ids have alike.
        vocabulary: ids of all processes.
    """
    if _compiled(logits):
        torch.ops.steel_megatron.cross_entropy_gradient_(logits, labels, columns, lse, factors, smoothing, vocabulary)
        return
    gradient = (logits.float() - lse[:, None]).exp_().sub_(smoothing / vocabulary).mul_(factors[:, None])
    gradient[:, columns:] = 0
    inside = (labels >= 0) & (labels < columns)
    at_label = (smoothing - 1) * factors * inside
    logits.copy_(gradient.scatter_add_(1, labels.where(inside, 0)[:, None], at_label[:, None]))


def add_(total: Tensor, addend: Tensor) -> None:
    """Add a tensor to another in float32, without a copy of it in that type.

    Args:
        total: float32.
        addend: of the same shape, float32, bfloat16 or float16.
    """
    if _compiled(addend) and total.is_contiguous() and addend.is_contiguous():
        torch.ops.steel_megatron.add_(total, addend)
    else:
        total.add_(addend)
