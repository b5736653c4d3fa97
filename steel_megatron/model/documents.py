"""Which documents the sequences of the current micro batch hold.

Layers get tokens' vectors, not tokens: where documents are packed (``data.reset_at_eod``), the modules of a stage that
must keep them apart share one of these, and each forward pass begins by setting it. What depends on the documents alone
is made by the first layer that asks, and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from steel_megatron.ops.plan import BlockPlan, SegmentPlan, block_plan, segment_plan

Made = TypeVar("Made")


class PackedDocuments:
    """The documents of the micro batch that a stage computes.

    Args:
        exchange_group: the processes that exchange slots, as they share the experts; None where each has all of them.

    Attributes:
        document_starts: int64 [B, T], for each token of the whole sequences, also where processes share these, the
            position of the first token of its document; None where every sequence is one document.
    """

    def __init__(self, exchange_group: dist.ProcessGroup | None = None) -> None:
        self.exchange_group = exchange_group
        self.set(None)

    def set(self, document_starts: torch.Tensor | None) -> None:
        """Take the documents of the next micro batch."""
        self.document_starts: torch.Tensor | None = document_starts
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[torch.Tensor], Made]) -> Made:
        """What depends on the documents alone: made by the first layer that asks, and kept for the others.

        Args:
            name: the same for all that ask for the same.
            make: gives it for the document starts.
        """
        if name not in self._made:
            assert self.document_starts is not None
            self._made[name] = make(self.document_starts)
        made: Made = self._made[name]
        return made

    def most(self, count: int) -> int:
        """The largest ``count`` of all processes that exchange slots; all of them call it for the same layer."""
        if self.exchange_group is None or self.exchange_group.size() == 1:
            return count
        assert self.document_starts is not None
        largest = torch.tensor([count], device=self.document_starts.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.exchange_group)
        return int(largest.item())

    def keep_for_backward(self, output: torch.Tensor) -> None:
        """Set the documents of this forward pass again when its backward pass begins.

        Layers may be computed again in the backward pass (``recompute_granularity``). A pipeline stage has by then seen
        other micro batches.

        Args:
            output: of the stage.
        """
        document_starts = self.document_starts
        if document_starts is not None and output.requires_grad:
            output.register_hook(lambda _gradient: self.set(document_starts))

    def attention_mask(self, first: int, stop: int) -> torch.Tensor | None:
        """Which keys some of the queries may see: those up to themselves, within their documents.

        Args:
            first: position of the first query.
            stop: the position after the last query, and after the last key.

        Returns:
            bool [B, 1, stop - first, stop]; None where every sequence is one document.
        """
        if self.document_starts is None:
            return None

        def make(document_starts: torch.Tensor) -> torch.Tensor:
            keys = torch.arange(stop, device=document_starts.device)
            seen = (keys <= keys[first:, None]) & (keys >= document_starts[:, first:stop, None])
            return seen.unsqueeze(1)

        return self.once(("attention", first, stop), make)

    def block_plan(self, block_length: int | None) -> BlockPlan:
        """The blocks of the packed documents, as many for each process that exchanges slots; all of them call it for
        the same layer.

        Args:
            block_length: of ``block_causal``; None for ``sequence``. The same for all layers of a stage.
        """

        def make(document_starts: torch.Tensor) -> BlockPlan:
            plan = block_plan(document_starts.size(1), block_length, document_starts.device, document_starts)
            return plan.filled_up(self.most(plan.starts.size(1)))

        return self.once("blocks", make)

    def segment_plan(self, block_length: int) -> SegmentPlan:
        """The segments of the packed documents in mode ``merged``; ``block_length`` is the same for all layers."""
        return self.once("segments", lambda document_starts: segment_plan(document_starts, block_length))
