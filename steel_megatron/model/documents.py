"""Which documents the sequences of the current micro batch hold.

Layers get tokens' vectors, not tokens: where documents are packed (``data.reset_at_eod``), the modules of a stage that
must keep them apart share one of these, and each forward pass begins by setting it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class PackedDocuments:
    """The documents of the micro batch that a stage computes.

    Attributes:
        segment_starts: int64 [B, T], for each token the position of the first token of its document; None where every
            sequence is one document.
        attention_mask: bool [B, 1, T, T], True where a query (row) may see a key: up to itself, within its document;
            None where every sequence is one document.
    """

    def __init__(self) -> None:
        self.segment_starts: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None

    def set(self, segment_starts: torch.Tensor | None) -> None:
        """Take the documents of the next micro batch."""
        self.segment_starts, self.attention_mask = segment_starts, None
        if segment_starts is not None:
            keys = torch.arange(segment_starts.size(1), device=segment_starts.device)
            seen = (keys <= keys.unsqueeze(1)) & (keys >= segment_starts.unsqueeze(-1))
            self.attention_mask = seen.unsqueeze(1)


def largest(number: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    agreed = torch.tensor([number], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed.item())
