"""The embedding, whose gradient touches only the rows of a micro batch's tokens.

torch makes a tensor as large as the matrix of it, zeros for the most part, which is then added to the sums of data
parallelism: at a vocabulary of 151,936 these passes cost more than the layers of a small model. Here the rows are added
to those sums (``main_grad``) themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding


class Embedding(VocabParallelEmbedding):
    """megatron-core's, with a gradient of rows."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Ids int64 [B, T] to rows [B, T, d], or to this process's [T / R, B, d] under sequence parallelism."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad and hasattr(self.weight, "main_grad")):
            output: torch.Tensor = super().forward(input_)
            return output
        ids = input_ - self.vocab_start_index
        inside = (ids >= 0) & (ids < self.weight.size(0))
        rows = _Rows.apply(ids.where(inside, 0), inside, self.weight)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Rows(torch.autograd.Function):
    """Rows of a matrix, 0 where the id is another process's; their gradients are added to ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, inside: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Look them up.

        Args:
            ctx: for the backward pass.
            ids: int64 [B, T].
            inside: bool [B, T], whether the row is here.
            matrix: [V / R, d].
        """
        ctx.save_for_backward(ids, inside)
        ctx.sums = matrix.main_grad  # type: ignore[attr-defined]
        return F.embedding(ids, matrix).mul_(inside[..., None])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        """Add the rows [B, T, d] up."""
        ids, inside = ctx.saved_tensors
        # index_put_ adds up in a fixed order on every device, and index_add_ does not.
        ctx.sums.index_put_((ids,), gradient.float() * inside[..., None], accumulate=True)
        return None, None, None


def add_gradients_by_row(stage: GPTModel) -> None:
    """Let a stage's embedding, if it has one, add up its gradient row by row.

    Args:
        stage: the part of the model.
    """
    if stage.pre_process:
        assert type(stage.embedding.word_embeddings) is VocabParallelEmbedding
        stage.embedding.word_embeddings.__class__ = Embedding
