"""The output layer, and the loss in it: logits of a few tokens at a time, never those of all.

Logits of a micro batch are the largest tensor of a step: 10 GB in float32 for 8 sequences of 2,048 tokens and a
vocabulary of 151,936. Their gradient is known as soon as they are, up to one factor, so the forward pass computes both
for one chunk of tokens after the other, in the same buffer. The matrix's gradient is added to the sums of data
parallelism (``main_grad``) where there are any, and is no tensor of its own then. Legend: N tokens, d hidden size, V
vocabulary (padding included), R tensor-parallel processes, each with V / R rows of the matrix.
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

from steel_megatron.ops import cross_entropy

CHUNK_BYTES = 2**25
"""Bound of the memory for logits, on each process."""
LEAST_TOKENS = {4: 64, 2: 256}
"""Of a chunk, by the bytes of a number: products of fewer are slow; those of two bytes are added in another pass."""


class Labels:
    """What the output layer is to compute the loss of: set before a forward pass, for that pass alone."""

    def __init__(self) -> None:
        self._own: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def set(self, labels: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0) -> None:
        """The next forward pass gives a loss in place of logits.

        Args:
            labels: int64 [B, T].
            weights: float32 [B, T], what each label's cross entropy is multiplied by.
            smoothing: share of each label's probability that is spread evenly over the vocabulary.
        """
        self._own = labels, weights, smoothing

    def take(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Labels, weights and smoothing, once; None where logits are asked for."""
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
        labels, weights = (tensor.t().flatten() for tensor in given[:2])
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
            given[2],
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
        smoothing: float = 0.0,
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
            smoothing: share of a label's probability that all V tokens have together, evenly.
        """
        rows, rank = matrix.size(0), group.rank()
        size = hidden.element_size()
        step = min(len(hidden), max(LEAST_TOKENS[size], CHUNK_BYTES // (size * rows)))
        columns = min(max(vocab_size - rows * rank, 0), rows)
        buffer = hidden.new_empty(step, rows)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        factors = weights if scale is None else weights * scale
        to_hidden, to_matrix = (torch.empty_like(hidden) if with_gradients else None), None
        ctx.summed = False
        if with_gradients and ctx.needs_input_grad[1]:
            to_matrix = getattr(matrix, "main_grad", None)
            ctx.summed = to_matrix is not None
            if to_matrix is None:
                to_matrix = torch.zeros_like(matrix, dtype=torch.float32)
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            tokens, own_labels = hidden[part], labels[part] - rows * rank
            logits = torch.mm(tokens, matrix.t(), out=buffer[: len(tokens)])
            lse, picked, sums = _statistics(logits, own_labels, columns, group)
            losses = lse - (1 - smoothing) * picked
            if smoothing:
                losses -= smoothing / vocab_size * sums
            total += (losses * weights[part]).sum(dtype=torch.float64)
            if to_hidden is None:
                continue
            cross_entropy.gradient_(logits, own_labels, columns, lse, factors[part], smoothing, vocab_size)
            torch.mm(logits, matrix, out=to_hidden[part])
            if to_matrix is None:
                continue
            if hidden.dtype == torch.float32:
                to_matrix.addmm_(logits.t(), tokens)
            else:  # a product is rounded once, their sum not at all
                cross_entropy.add_(to_matrix, logits.t() @ tokens)
        ctx.gradients, ctx.scale = (to_hidden, None if ctx.summed else to_matrix), scale
        return total.float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the forward pass has computed, once."""
        (to_hidden, to_matrix), ctx.gradients = ctx.gradients, None
        factor = gradient if ctx.scale is None else gradient / ctx.scale
        if ctx.summed:  # no factor can be applied to the matrix's any more
            torch._assert_async((factor == 1.0).all())
        elif factor.is_cuda or float(factor) != 1.0:
            to_hidden.mul_(factor)
            if to_matrix is not None:
                to_matrix.mul_(factor)
        return to_hidden, to_matrix, *[None] * 7


def _statistics(
    logits: torch.Tensor, labels: torch.Tensor, columns: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Of each token, over the columns of all processes: log-sum-exp, the label's logit and the sum; float32 [n] each.

    Args:
        logits: [n, V / R].
        labels: int64 [n], counted from this process's first row; those of other processes are outside of its rows.
        columns: how many of this process's are not padding.
        group: processes that share the vocabulary.
    """
    own = cross_entropy.statistics(logits, labels, columns)
    if group.size() == 1:
        return own.unbind()
    gathered = own.new_empty(3 * group.size(), len(labels))
    dist.all_gather_into_tensor(gathered, own, group=group)
    lse, picked, sums = gathered.view(group.size(), *own.shape).unbind(1)
    return torch.logsumexp(lse, 0), picked.sum(0), sums.sum(0)
