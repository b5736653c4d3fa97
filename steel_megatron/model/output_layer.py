"""The output layer, and the loss in it: logits of a few tokens at a time, never those of all.

Logits of a micro batch are the largest tensor of a step: 10 GB in float32 for 8 sequences of 2,048 tokens and a
vocabulary of 151,936. Their gradient is known as soon as they are, up to one factor, so the forward pass computes both
for a chunk of tokens, in one buffer, and goes on to the next. Legend: N tokens, d hidden size, V vocabulary (padding
included), R tensor-parallel processes, each with V / R rows of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

CHUNK_BYTES = 2**25
"""Bound of the memory for logits in float32, on each process."""
LEAST_TOKENS = 64
"""Of a chunk: matrix products of fewer are slow."""


class Labels:
    """What the output layer is to compute the loss of: set before a forward pass, for that pass alone."""

    def __init__(self) -> None:
        self._own: tuple[torch.Tensor, torch.Tensor] | None = None

    def set(self, labels: torch.Tensor, weights: torch.Tensor) -> None:
        """The next forward pass gives a loss in place of logits.

        Args:
            labels: int64 [B, T].
            weights: float32 [B, T], what each label's cross entropy is multiplied by.
        """
        self._own = labels, weights

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Labels and weights, once; None where logits are asked for."""
        own, self._own = self._own, None
        return own


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which computes the loss itself where it is given labels.

    Attributes:
        labels: shared by the chunks of a process.
        vocab_size: ids from here on are padding and get no probability.
    """

    labels: Labels
    vocab_size: int

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Hidden states [T, B, d] to logits [T, B, V / R], or to the weighted sum of losses, float32 [1, 1]."""
        given = self.labels.take()
        if given is None:
            return super().forward(input_, *args, **kwargs)
        labels, weights = (tensor.t().flatten() for tensor in given)
        group = self.tp_group
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=group)
        else:
            input_ = copy_to_tensor_model_parallel_region(input_, group=group)
        scale = self.config.grad_scale_func
        loss = _LinearCrossEntropy.apply(
            input_.flatten(0, 1),
            self.weight,
            labels,
            weights,
            self.vocab_size,
            group,
            None if scale is None else scale(torch.ones(1, device=input_.device)),
            torch.is_grad_enabled(),
        )
        return loss.view(1, 1), None


def compute_losses_in(stage: GPTModel, vocab_size: int, labels: Labels) -> None:
    """Let a stage's output layer, if it has one, compute losses.

    Args:
        stage: the part of the model; gets an attribute ``labels``.
        vocab_size: ids below it are tokens.
        labels: what it is to read; the same for all chunks of a process.
    """
    stage.labels = labels
    if stage.post_process:
        assert type(stage.output_layer) is ColumnParallelLinear
        stage.output_layer.__class__ = OutputLayer
        stage.output_layer.labels, stage.output_layer.vocab_size = labels, vocab_size


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of weight times cross entropy of hidden @ matrix^T, in float32.

    The gradients are computed in the forward pass, multiplied by the loss scale (a gradient of logits can be too
    small for float16), and the backward pass multiplies them by what is left of the incoming gradient: 1, as a rule.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        matrix: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        scale: torch.Tensor | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        """The sum, float32 [].

        Args:
            ctx: for the backward pass.
            hidden: [N, d], the same on all processes of ``group``.
            matrix: [V / R, d].
            labels: int64 [N].
            weights: float32 [N].
            vocab_size: ids from here on are padding.
            group: processes that share the vocabulary.
            scale: the loss scale, [1]; None for 1.
            with_gradients: whether a backward pass will follow.
        """
        rows, rank = matrix.size(0), group.rank()
        step = min(len(hidden), max(LEAST_TOKENS, CHUNK_BYTES // (4 * rows)))
        own_rows = min(max(vocab_size - rows * rank, 0), rows)
        buffer = torch.empty(step, rows, dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        factors = weights if scale is None else weights * scale
        to_hidden = torch.empty_like(hidden) if with_gradients else None
        of_matrix = with_gradients and ctx.needs_input_grad[1]
        to_matrix = torch.empty_like(matrix, dtype=torch.float32) if of_matrix else None
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            tokens, logits = hidden[part], buffer[: len(hidden[part])]
            if hidden.dtype == torch.float32:
                torch.mm(tokens, matrix.t(), out=logits)
            else:
                logits.copy_(tokens @ matrix.t())
            logits[:, own_rows:] = torch.finfo(torch.float32).min
            losses, probabilities, index, inside = _cross_entropy(logits, labels[part] - rows * rank, group)
            total += (losses * weights[part]).sum(dtype=torch.float64)
            if to_hidden is None:
                continue
            # The gradient of logits: probabilities, minus 1 at the label, times the weight of the token.
            gradient = probabilities.mul_(factors[part, None])
            gradient.scatter_add_(1, index[:, None], -(factors[part] * inside)[:, None])
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, matrix, out=to_hidden[part])
            if to_matrix is None:
                continue
            if hidden.dtype != torch.float32:  # a product is rounded once, their sum not at all
                product = gradient.t() @ tokens
                to_matrix.copy_(product) if first == 0 else to_matrix.add_(product)
            else:
                to_matrix.addmm_(gradient.t(), tokens, beta=0 if first == 0 else 1)
        ctx.gradients, ctx.scale = (to_hidden, to_matrix), scale
        return total.float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the forward pass has computed, once."""
        (to_hidden, to_matrix), ctx.gradients = ctx.gradients, None
        factor = gradient if ctx.scale is None else gradient / ctx.scale
        if factor.is_cuda or float(factor) != 1.0:
            to_hidden.mul_(factor)
            if to_matrix is not None:
                to_matrix.mul_(factor)
        return to_hidden, to_matrix, *[None] * 6


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [n]; probabilities, in the memory of ``logits``; each label's column, and 1 where it is here, else 0.

    Args:
        logits: float32 [n, V / R].
        labels: int64 [n], counted from this process's first row; those of other processes are outside of its rows.
        group: processes that share the vocabulary.
    """
    inside = (labels >= 0) & (labels < logits.size(1))
    index = labels.where(inside, 0)
    if group.size() == 1:
        losses = -torch.log_softmax(logits, -1, out=logits).gather(1, index[:, None]).squeeze(1)
        return losses, logits.exp_(), index, inside
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(largest[:, None])
    predicted = logits.gather(1, index[:, None]).squeeze(1) * inside
    sums = torch.stack((logits.exp_().sum(-1), predicted))
    dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1], logits.div_(sums[0][:, None]), index, inside
