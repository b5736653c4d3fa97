"""Dropout whose masks depend on the run's seed, the step, the sample and the place in it, and on nothing else.

Each element's number comes from a hash of these (splitmix64), not from a generator with a state. So a resumed run, a
layer that is computed again in the backward pass, and any layout have the same masks: tensor-parallel copies of a
vector agree, and a layout computes what one process computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_unfused

from steel_megatron.parallel.sequence import SequenceSplit

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""The constants of splitmix64 (Steele, Lea and Flood 2014), as signed numbers."""
EMBEDDING, ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_FEED_FORWARD = range(4)
"""The places in a layer; the embedding is in layer 0."""
ADAPTER_OF_QKV, ADAPTER_OF_OUTPUT = range(2)
ADAPTERS = 2**20
"""Added to the number of a layer where its adapters drop something: above the number of any layer."""


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64's output function, of int64 numbers that are overwritten."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        numbers ^= (numbers >> shift) & ((1 << (64 - shift)) - 1)  # the sign is not shifted in
        numbers *= factor
    numbers ^= (numbers >> 31) & ((1 << 33) - 1)
    return numbers


def _below(keys: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A key [..., n] for each number [n] below each key [...]; every key has a stream of its own."""
    return _mixed(keys.unsqueeze(-1) + numbers * _STRIDE)


class Dropout:
    """What the modules of a pipeline stage drop in the current micro batch.

    Args:
        hidden: probability with which an element of a vector is dropped.
        attention: the same of an attention weight.
        groups: the process groups.
        sequence_parallel: whether tensor-parallel processes share tokens.
        adapters: the same of an element of what an adapter is given.
    """

    def __init__(
        self,
        hidden: float,
        attention: float,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
        adapters: float = 0.0,
    ) -> None:
        self.hidden, self.attention, self.adapters = hidden, attention, adapters
        self._context_rank, self._context_size = groups.cp.rank(), groups.cp.size()
        self._tensor_rank, self._tensor_size = groups.tp.rank(), groups.tp.size()
        self._sharing = self._tensor_size if sequence_parallel else 1
        self.set(0, 0, 0)

    def set(self, seed: int, step: int, first_sample: int) -> None:
        """Begin the next micro batch.

        Args:
            seed: of the run.
            step: the optimizer step that it is of.
            first_sample: number of its first sample in the step's global batch.
        """
        self._at = seed, step, first_sample

    def keep_for_backward(self, output: torch.Tensor) -> None:
        """Set this micro batch again when its backward pass begins, which may compute layers again.

        Args:
            output: of the stage.
        """
        at = self._at
        if (self.hidden or self.attention or self.adapters) and output.requires_grad:
            output.register_hook(lambda _gradient: self.set(*at))

    def drop_hidden(self, x: torch.Tensor, layer: int, place: int) -> torch.Tensor:
        """Drop elements of vectors, and scale the others.

        Args:
            x: [T, B, d], this process's tokens.
            layer: number of the layer, from 1; 0 for the embedding.
            place: in the layer.
        """
        rows = self._token_keys(x, layer, place, self._sharing)
        return self._drop(x, _below(rows, torch.arange(x.size(-1), device=x.device)), self.hidden)

    def drop_input(
        self, x: torch.Tensor, layer: int, place: int, *, first_column: int = 0, whole: bool = False
    ) -> torch.Tensor:
        """Drop elements of what an adapter is given, and scale the others.

        Args:
            x: [T, B, columns], this process's tokens.
            layer: number of the layer, from 1.
            place: the adapter's.
            first_column: number of the first column in the whole vector.
            whole: whether tensor-parallel processes have the same tokens, also where they share them elsewhere.
        """
        rows = self._token_keys(x, ADAPTERS + layer, place, 1 if whole else self._sharing)
        columns = torch.arange(first_column, first_column + x.size(-1), device=x.device)
        return self._drop(x, _below(rows, columns), self.adapters)

    def _token_keys(self, x: torch.Tensor, layer: int, place: int, sharing: int) -> torch.Tensor:
        """int64 [T, B], a key of each token of x [T, B, ...], which so many tensor-parallel processes share."""
        ranks = self._context_size * sharing
        rank = self._context_rank * sharing + (self._tensor_rank if sharing > 1 else 0)
        positions = SequenceSplit(x.size(0) * ranks, self._context_size, sharing).positions(rank).to(x.device)
        return _below(self._sample_keys(x.size(1), layer, place, x.device), positions).T.contiguous()

    def drop_attention(self, weights: torch.Tensor, layer: int, first_query: int) -> torch.Tensor:
        """Drop attention weights, and scale the others.

        Args:
            weights: [B, heads, queries, keys], of this process's heads; keys from the first token on.
            layer: number of the layer, from 1.
            first_query: position of the first query in the sequence.
        """
        batch, heads, queries, keys = weights.shape
        device = weights.device
        samples = self._sample_keys(batch, layer, ATTENTION_WEIGHTS, device)
        of_heads = _below(samples, torch.arange(heads, device=device) + self._tensor_rank * heads)
        rows = _below(of_heads, torch.arange(first_query, first_query + queries, device=device))
        return self._drop(weights, _below(rows, torch.arange(keys, device=device)), self.attention)

    def _sample_keys(self, batch_size: int, layer: int, place: int, device: torch.device) -> torch.Tensor:
        """int64 [B], a key of each sample for one place of one layer."""
        seed, step, first = self._at
        key = torch.zeros(1, dtype=torch.int64)
        for number in (seed, step, 4 * layer + place):
            key = _below(key, torch.tensor([number])).flatten()
        return _below(key.to(device), torch.arange(first, first + batch_size, device=device)).squeeze(0)

    @staticmethod
    def _drop(x: torch.Tensor, numbers: torch.Tensor, probability: float) -> torch.Tensor:
        kept = numbers >= round(probability * 2**64) - 2**63
        return torch.where(kept, x, 0) * (1 / (1 - probability))


class EmbeddingDropout(torch.nn.Module):
    """Stands for the dropout of megatron-core's embedding."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, B, d] to the same."""
        return self.dropout.drop_hidden(x, 0, EMBEDDING) if self.training else x


class DropoutAdd:
    """Stands for megatron-core's sum of a residual stream and what a part of a layer gave, with dropout.

    Args:
        dropout: the stage's.
        layer: number of the layer, from 1.
        place: in the layer.
    """

    def __init__(self, dropout: Dropout, layer: int, place: int) -> None:
        self.dropout, self.layer, self.place = dropout, layer, place

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The sum's function, as megatron-core's layer asks for it."""
        return self._add if training else bias_dropout_add_unfused(False)

    def _add(
        self, with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, probability: float
    ) -> torch.Tensor:
        x, bias = with_bias
        x = x if bias is None else x + bias
        return residual.to(x.dtype) + self.dropout.drop_hidden(x, self.layer, self.place)
