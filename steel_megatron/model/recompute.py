"""Routing that is made again in the backward pass (``parallel.recompute: routing``).

torch's checkpointing drops what a function saves and runs the function once more when the backward pass asks for it.
Routing is cheap to run again, experts and collectives between processes are not, and both are inside what a routing
mode computes. So a mode gets a layer whose experts answer the second time with what they computed the first time; and
the slots, which the experts save for the gradients of their weights, are taken from the mode's second run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from steel_megatron.model.routing import RoutedLayer, SharedSequences


def recomputed(
    route: Callable[[RoutedLayer, torch.Tensor, SharedSequences | None], torch.Tensor],
    layer: RoutedLayer,
    x: torch.Tensor,
    shared: SharedSequences | None,
) -> torch.Tensor:
    """Route tokens, and make everything but the experts' results again in the backward pass.

    Args:
        route: what the layer's mode computes, with the layer that it is given.
        layer: the layer.
        x: [B, L, d] tokens.
        shared: the processes that share the sequences; None where each has whole ones.

    Returns:
        [B, L, d]
    """
    kept = _KeptResults()
    stand_in = cast(RoutedLayer, _LayerWithKeptResults(layer, kept))
    if shared is not None:
        shared = replace(shared, gather=partial(kept.call, shared.gather))

    def run(tokens: torch.Tensor) -> torch.Tensor:
        kept.begin()
        return route(stand_in, tokens, shared)

    y: torch.Tensor = checkpoint(run, x, use_reentrant=False)
    kept.forget_what_is_in(y)
    return y


class _KeptResults:
    """Results of calls within a checkpointed function, which later runs of the function get without calling."""

    def __init__(self) -> None:
        self._results: list[torch.Tensor | None] = []
        self._runs = self._calls = 0

    def begin(self) -> None:
        """The function runs, for the first time or again."""
        self._runs, self._calls = self._runs + 1, 0

    def call(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """The function's result the first time; the same numbers in later runs."""
        held = [_Held(one) for one in inputs]
        if self._runs > 1:
            self._calls += 1
            again = self._results[self._calls - 1]
            if again is not None:
                return again.detach().requires_grad_(again.requires_grad)
        # Inside, tensors are saved as if there were no checkpoint, but for the inputs: these come from the next run.
        with saved_tensors_hooks(partial(_pack, held), _unpack):
            result = function(*(one.take() for one in held))
        if self._runs == 1:
            self._results.append(result.detach().requires_grad_(result.requires_grad))
        return result

    def forget_what_is_in(self, y: torch.Tensor) -> None:
        """Keep no result that the function only returned, in whatever shape: its later runs end before it."""
        memory = y.untyped_storage().data_ptr()
        self._results = [
            None if one is None or one.untyped_storage().data_ptr() == memory else one for one in self._results
        ]


class _LayerWithKeptResults:
    """A routed layer whose experts compute once."""

    def __init__(self, layer: RoutedLayer, kept: _KeptResults) -> None:
        self._layer, self._kept = layer, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def run_experts(self, vectors: torch.Tensor, *, replicated: bool = False) -> torch.Tensor:
        return self._kept.call(partial(self._layer.run_experts, replicated=replicated), vectors)

    def run_merged_experts(
        self, segments: torch.Tensor, weights: torch.Tensor, *, equal_segments: bool = True
    ) -> torch.Tensor:
        """Args: as for :meth:`steel_megatron.model.routing.RoutedLayer.run_merged_experts`."""
        return self._kept.call(
            partial(self._layer.run_merged_experts, equal_segments=equal_segments), segments, weights
        )


class _Save(torch.autograd.Function):
    """Saves its input, so that the checkpoint counts it among what the next run makes again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """``x`` unchanged.

        Args:
            ctx: autograd's context.
            x: any tensor.
        """
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Held:
    """An input of a call, of which only the place in memory is remembered.

    Args:
        x: the input.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = _Save.apply(x)
        self._node: Any = self._tensor.grad_fn
        self._again: torch.Tensor | None = None
        self._storage, self._offset, self._dtype = x.untyped_storage().data_ptr(), x.storage_offset(), x.dtype

    def take(self) -> torch.Tensor:
        """The input, once; it is not kept."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor

    def has(self, x: torch.Tensor) -> bool:
        """Whether a tensor lies in the input's memory, and the checkpoint brings that again."""
        return self._node is not None and x.dtype == self._dtype and x.untyped_storage().data_ptr() == self._storage

    def view(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What gives such a tensor in the backward pass, without the memory that it lies in."""
        size, stride, offset = x.size(), x.stride(), x.storage_offset() - self._offset
        return lambda: self._made_again().as_strided(size, stride, self._made_again().storage_offset() + offset)

    def _made_again(self) -> torch.Tensor:
        if self._again is None:
            (self._again,) = self._node.saved_tensors  # runs the checkpointed function again, unless it has been
        return self._again


def _pack(held: list[_Held], x: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
    for one in held:
        if one.has(x):
            return one.view(x)
    return x


def _unpack(packed: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return packed if isinstance(packed, torch.Tensor) else packed()
