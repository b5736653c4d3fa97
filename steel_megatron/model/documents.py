"""Which documents the sequences of the current micro batch hold.

Layers get tokens' vectors, not tokens: where documents are packed (``data.reset_at_eod``), the modules of a stage that
must keep them apart share one of these, and each forward pass begins by setting it. What depends on the documents alone
is made by the first layer that asks, and kept for the others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from steel_megatron.ops.plan import BlockPlan, SegmentPlan, block_plan, segment_plan


class PackedDocuments:
    """The documents of the micro batch that a stage computes.

    Args:
        ep_group: the processes that share the experts, which exchange slots; None where each has all of them.

    Attributes:
        document_starts: int64 [B, T], for each token the position of the first token of its document; None where every
            sequence is one document.
    """

    def __init__(self, ep_group: dist.ProcessGroup | None = None) -> None:
        self.ep_group = ep_group
        self.set(None)

    def set(self, document_starts: torch.Tensor | None) -> None:
        """Take the documents of the next micro batch."""
        self.document_starts: torch.Tensor | None = document_starts
        self._attention_mask: torch.Tensor | None = None
        self._block_plan: BlockPlan | None = None
        self._segment_plan: SegmentPlan | None = None

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

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """bool [B, 1, T, T], True where a query (row) may see a key: up to itself, within its document; None where
        every sequence is one document."""
        document_starts = self.document_starts
        if self._attention_mask is None and document_starts is not None:
            keys = torch.arange(document_starts.size(1), device=document_starts.device)
            seen = (keys <= keys.unsqueeze(1)) & (keys >= document_starts.unsqueeze(-1))
            self._attention_mask = seen.unsqueeze(1)
        return self._attention_mask

    def block_plan(self, block_length: int | None) -> BlockPlan:
        """The blocks of the packed documents, as many for each process that exchanges slots; all of them call it for
        the same layer.

        Args:
            block_length: of ``block_causal``; None for ``sequence``. The same for all layers of a stage.
        """
        if self._block_plan is None:
            assert self.document_starts is not None
            plan = block_plan(
                self.document_starts.size(1), block_length, self.document_starts.device, self.document_starts
            )
            if self.ep_group is not None and self.ep_group.size() > 1:
                most = torch.tensor([plan.starts.size(1)], device=plan.starts.device)
                dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ep_group)
                plan = plan.filled_up(int(most.item()))
            self._block_plan = plan
        return self._block_plan

    def segment_plan(self, block_length: int) -> SegmentPlan:
        """The segments of the packed documents in mode ``merged``; ``block_length`` is the same for all layers."""
        if self._segment_plan is None:
            assert self.document_starts is not None
            self._segment_plan = segment_plan(self.document_starts, block_length)
        return self._segment_plan
