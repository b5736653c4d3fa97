"""What training minimises, as the function that megatron-core's schedules call for every micro batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from steel_megatron.model.documents import PackedDocuments
from steel_megatron.parallel.sequence import SequenceSplit
from steel_megatron.parallel.topology import Topology

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Batch:
    """A micro batch of B sequences of T tokens; under context parallelism, this process's T of them.

    Attributes:
        tokens: int64 [B, T].
        labels: int64 [B, T]; labels[:, t] is the token to be predicted at position t (already shifted).
        loss_mask: float32 [B, T]; 0 where a label does not count.
        segment_starts: int64 [B, T], for each token the position of the first token of its document; None where
            documents that share a sequence see each other.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    segment_starts: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        starts = None if self.segment_starts is None else self.segment_starts.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), self.loss_mask.to(device), starts)

    def part(self, topology: Topology) -> Batch:
        """What this process has of whole sequences, on its device: all of them, or its pieces of each."""
        context_size = topology.parallel.context_parallel_size
        assert context_size == 1 or self.segment_starts is None  # RunConfig refuses it
        if context_size == 1:
            return self.to(topology.device)
        positions = SequenceSplit(self.tokens.size(1), context_size).positions(topology.context_parallel_rank)
        return Batch(self.tokens[:, positions], self.labels[:, positions], self.loss_mask[:, positions]).to(
            topology.device
        )


class NextToken:
    """Next-token cross entropy in float32, summed over the labels that count.

    Args:
        vocab_size: ids from here on are padding of the embedding matrix and get no probability.
        groups: the process groups.
        documents: what the stage's modules look at to keep packed documents apart.
    """

    def __init__(self, vocab_size: int, groups: ProcessGroupCollection, documents: PackedDocuments) -> None:
        self.vocab_size, self.documents = vocab_size, documents
        self.tp_group, self.cp_group = groups.tp, groups.cp

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """One forward of one pipeline stage; signature and result as megatron-core's schedules want them."""
        batch = next(batches)
        batch_size, length = batch.tokens.shape
        split = SequenceSplit(length * self.cp_group.size(), self.cp_group.size())
        positions = split.positions(self.cp_group.rank()).to(batch.tokens.device).expand(batch_size, length)
        self.documents.set(batch.segment_starts)
        output = model(batch.tokens, positions, None)
        return output, partial(self.loss, batch)

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every position in nats, float32 [B, T], from this process's logits [B, T, V / TP]."""
        local = logits.size(-1)
        own_vocabulary = self.vocab_size - local * self.tp_group.rank()
        logits = logits.float()
        if own_vocabulary < local:
            padding = torch.arange(local, device=logits.device) >= own_vocabulary
            logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        return vocab_parallel_cross_entropy(logits, labels)

    def loss(self, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of losses, number of labels that count, and both in one tensor for the report."""
        total = (self.token_losses(logits, batch.labels) * batch.loss_mask).sum()
        count = batch.loss_mask.sum()
        return total, count.int(), torch.stack((total.detach(), count)).double()


def infer_shape(batch: Batch, context_parallel_size: int) -> dict[str, Any]:
    """The sizes that megatron-core's schedules ask for: those of whole sequences."""
    return {"seq_length": batch.tokens.size(1) * context_parallel_size, "micro_batch_size": batch.tokens.size(0)}
