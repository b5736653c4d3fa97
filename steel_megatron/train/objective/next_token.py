"""Next-token prediction: the objective of pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from steel_megatron.config import RunConfig
from steel_megatron.errors import ConfigError
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.implementation import cross_entropy
from steel_megatron.model.output_layer import Labels
from steel_megatron.parallel.sequence import SequenceSplit
from steel_megatron.parallel.topology import Topology
from steel_megatron.platform import LOCAL, Implementation, choose_implementation
from steel_megatron.train.objective.base import OBJECTIVES, LossFunction

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class Batch:
    """A micro batch of B sequences of T tokens; under context parallelism, this process's T of them.

    Attributes:
        tokens: int64 [B, T].
        labels: int64 [B, T]; labels[:, t] is the token to be predicted at position t (already shifted).
        loss_mask: float32 [B, T]; the weight of each label in the sum of losses, 0 where it does not count.
        document_starts: int64 [B, T of whole sequences], for each token the position of the first token of its
            document; None where documents that share a sequence see each other.
        items: float32 [], what the sum of losses is divided by, over all micro batches; under context parallelism, of
            whole sequences on the first process and 0 on the others. None for the sum of ``loss_mask``.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    document_starts: torch.Tensor | None = None
    items: torch.Tensor | None = None

    @classmethod
    def shifted(
        cls,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        starts: torch.Tensor | None,
        topology: Topology,
        items: torch.Tensor | None = None,
    ) -> Batch:
        """This process's part of the batch in which every token predicts the next one.

        Args:
            tokens: int64 [B, T + 1].
            weights: float32 [B, T], of the labels.
            starts: int64 [B, T + 1], as ``document_starts``.
            topology: the process groups.
            items: as of the batch.
        """
        return cls(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=weights.contiguous(),
            document_starts=None if starts is None else starts[:, :-1].contiguous(),
            items=items,
        ).part(topology)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        starts = None if self.document_starts is None else self.document_starts.to(device)
        items = None if self.items is None else self.items.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), self.loss_mask.to(device), starts, items)

    def part(self, topology: Topology) -> Batch:
        """What this process has of whole sequences, on its device: all of them, or its pieces of each."""
        context_size = topology.parallel.context_parallel_size
        if context_size == 1:
            return self.to(topology.device)
        positions = SequenceSplit(self.tokens.size(1), context_size).positions(topology.context_parallel_rank)
        items = self.items
        if items is not None and topology.context_parallel_rank:
            items = torch.zeros_like(items)
        # Where documents begin is asked of whole sequences: a chunk may hold the end of one, and a mean over it.
        return Batch(
            self.tokens[:, positions],
            self.labels[:, positions],
            self.loss_mask[:, positions],
            self.document_starts,
            items,
        ).to(topology.device)


class NextToken:
    """Next-token cross entropy in float32, summed over the labels by their weights.

    The stage's output layer computes it, and no logits of whole micro batches are made. A subclass that overrides
    :meth:`loss` or :meth:`token_losses` is given logits.

    Args:
        loss_name: what its loss is called in a report.
        vocab_size: ids from here on are padding of the embedding matrix and get no probability.
        groups: the process groups.
        documents: read by the stage's modules to keep packed documents apart.
        labels: read by the stage's output layer.
        implementation: what computes the cross entropy.

    Attributes:
        items: what the mean that is minimised is over.
        label_smoothing: share of each label's probability that is spread evenly over the vocabulary, in training.
    """

    items = "tokens"
    label_smoothing = 0.0

    def __init__(
        self,
        loss_name: str,
        vocab_size: int,
        groups: ProcessGroupCollection,
        documents: PackedDocuments,
        labels: Labels,
        implementation: Implementation = LOCAL,
    ) -> None:
        self.terms: tuple[str, ...] = (loss_name,)
        self.vocab_size, self.documents, self.labels = vocab_size, documents, labels
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.cross_entropy = cross_entropy(implementation, groups.tp)

    @classmethod
    def build(cls, run: RunConfig, topology: Topology, stage: GPTModel) -> NextToken:
        """The objective of a run, for one pipeline stage.

        Args: as for :meth:`steel_megatron.train.objective.Objective.build`.
        """
        chosen = choose_implementation(run.model.implementation)
        built = cls(run.model.loss_name, run.model.vocab_size, topology.groups, stage.documents, stage.labels, chosen)
        built.label_smoothing = run.training.label_smoothing
        if built.label_smoothing and built._reads_logits:
            own = "; set dpo.label_smoothing, of pairs" if run.training.objective == "dpo" else ""
            raise ConfigError(
                f"training.label_smoothing is {built.label_smoothing}, but the objective {run.training.objective} "
                f"computes another loss, which it would not change{own}"
            )
        return built

    @classmethod
    def batch(
        cls, samples: np.ndarray, starts: np.ndarray | None, counts: torch.Tensor | None, topo: Topology
    ) -> Batch:
        """This process's part of a micro batch; the first token of a packed document is no label.

        Args: as for :meth:`steel_megatron.train.objective.Objective.batch`.
        """
        tokens = torch.from_numpy(samples)
        mask = torch.ones(tokens.size(0), tokens.size(1) - 1)
        if starts is not None:  # no document says how another one begins
            mask = torch.from_numpy(starts[:, 1:] != np.arange(1, starts.shape[1])).float()
        first_tokens = None if starts is None else torch.from_numpy(starts)
        return Batch.shifted(tokens, mask if counts is None else mask * counts, first_tokens, topo)

    def sizes(self, batch: Batch) -> dict[str, int]:
        """Tokens of whole sequences, and sequences."""
        batch_size, length = batch.tokens.shape
        return {"seq_length": length * self.cp_group.size(), "micro_batch_size": batch_size}

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """One forward of one pipeline stage; signature and result as megatron-core's schedules want them."""
        batch = next(batches)
        batch_size, length = batch.tokens.shape
        split = SequenceSplit(length * self.cp_group.size(), self.cp_group.size())
        positions = split.positions(self.cp_group.rank()).to(batch.tokens.device).expand(batch_size, length)
        self.documents.set(batch.document_starts)
        in_output_layer = not self._reads_logits
        if in_output_layer:
            # What is validated is not smoothed, so that it compares with other runs.
            self.labels.set(batch.labels, batch.loss_mask, self.label_smoothing if model.training else 0.0)
        output = model(batch.tokens, positions, None)
        self.labels.take()  # no output layer has, on the other pipeline stages
        return output, partial(self._with_counts if in_output_layer else self.loss, batch)

    @property
    def _reads_logits(self) -> bool:
        """Whether this is an objective of one's own, which computes something else from them."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(NextToken, name)
            for name in ("loss", "token_losses")
        )

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every position in nats, float32 [B, T], from this process's logits [B, T, V / TP]."""
        local = logits.size(-1)
        own_vocabulary = self.vocab_size - local * self.tp_group.rank()
        logits = logits.float()
        if own_vocabulary < local:
            padding = torch.arange(local, device=logits.device) >= own_vocabulary
            logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        return self.cross_entropy(logits, labels)

    def loss(self, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of losses, what it is divided by, and the report of both: float64 [1, 2]."""
        return self._with_counts(batch, (self.token_losses(logits, batch.labels) * batch.loss_mask).sum())

    def _with_counts(self, batch: Batch, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of losses, of one element, with the other two of :meth:`loss`."""
        total = total.sum()  # no view of it: the schedules free what they are given
        count = batch.loss_mask.sum() if batch.items is None else batch.items
        return total, count.int(), torch.stack((total.detach(), count)).double().unsqueeze(0)


OBJECTIVES["next_token"] = NextToken
