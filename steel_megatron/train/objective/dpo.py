"""Direct preference optimization of packed pairs, against stored log-probabilities of a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from steel_megatron.config import DpoConfig, RunConfig
from steel_megatron.data.indexed.labels import LABEL
from steel_megatron.data.ledger.loader import document_of
from steel_megatron.parallel.sequence import SequenceSplit
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.objective.base import OBJECTIVES, LossFunction
from steel_megatron.train.objective.next_token import Batch, NextToken

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class PairBatch:
    """A micro batch of packed pairs.

    Attributes:
        sequences: the tokens; ``loss_mask`` is 1 for the labels of both answers.
        texts: int64 [B, T of this process], for each label the number of its text among the 2 P of all pairs, chosen
            and rejected taking turns; 0 where there is no label.
        keys: int64 [P], by :func:`~steel_megatron.data.ledger.loader.document_key`.
        counts: float32 [P], 0 for pairs that only fill up the batch.
    """

    sequences: Batch
    texts: torch.Tensor
    keys: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Pairs:
    """What is known of P pairs: float32 [P, 2] each, of the chosen and the rejected text."""

    policy: torch.Tensor
    """Sum of the log-probabilities of the labels."""
    reference: torch.Tensor
    """The same of the reference."""
    labels: torch.Tensor
    """Number of labels."""

    @property
    def ratios(self) -> torch.Tensor:
        """Logarithm of policy over reference."""
        return self.policy - self.reference


def sigmoid_loss(pairs: Pairs, settings: DpoConfig) -> torch.Tensor:
    """The loss of each pair, float32 [P]: DPO, conservative with label smoothing."""
    margin = settings.beta * (pairs.ratios[:, 0] - pairs.ratios[:, 1])
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def ipo_loss(pairs: Pairs, settings: DpoConfig) -> torch.Tensor:
    """The loss of each pair, float32 [P]: IPO on means over labels."""
    per_label = pairs.ratios / pairs.labels.clamp(min=1)
    return (per_label[:, 0] - per_label[:, 1] - 1 / (2 * settings.beta)) ** 2


PREFERENCE_LOSSES: dict[str, Callable[[Pairs, DpoConfig], torch.Tensor]] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}
"""The losses by the name that ``dpo.loss`` gives."""


class Dpo(NextToken):
    """The mean over the pairs of the global batch; built by :meth:`build`.

    Attributes:
        settings: the loss.
        reference: by number of the corpus, log-probabilities of the reference, float32 [documents, 2].
        recorded: in place of training, where those are written to; None while training.
    """

    labelled, kind, items = True, "pairs", "pairs"
    settings = DpoConfig()
    reference: dict[int, torch.Tensor]
    recorded: dict[int, torch.Tensor] | None = None

    @classmethod
    def build(cls, run: RunConfig, topology: Topology, stage: GPTModel) -> Dpo:
        """The objective of a run, for one pipeline stage.

        Args: as for :meth:`steel_megatron.train.objective.Objective.build`.
        """
        objective = super().build(run, topology, stage)
        assert isinstance(objective, Dpo)
        objective.settings, objective.reference = run.dpo, {}
        objective.terms = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp",
                           "rejected_logp", "kl")  # fmt: skip
        return objective

    @classmethod
    def batch(  # type: ignore[override]
        cls,
        samples: np.ndarray,
        starts: np.ndarray,
        counts: torch.Tensor | None,
        topo: Topology,
        labels: np.ndarray,
        documents: np.ndarray,
    ) -> PairBatch:
        """This process's part of a micro batch of packed pairs.

        Args: as for :meth:`steel_megatron.train.objective.Sft.batch`.
        """
        tokens, owners, firsts = (torch.from_numpy(values) for values in (samples, documents, starts))
        size = tokens.size(1)
        mask = torch.from_numpy(labels & LABEL).float()
        mask[firsts == torch.arange(size)] = 0
        begins = torch.ones_like(owners, dtype=torch.bool)
        begins[:, 1:] = owners[:, 1:] != owners[:, :-1]
        first = torch.where(begins, torch.arange(size), 0).cummax(dim=1).values
        pair = ((begins & (owners >= 0)).flatten().long().cumsum(0) - 1).view_as(owners)
        texts = torch.where(mask > 0, 2 * pair + (firsts > first), 0)
        opened = begins & (owners >= 0)
        weights = torch.ones(tokens.size(0), 1) if counts is None else counts
        split = SequenceSplit(size - 1, topo.parallel.context_parallel_size)
        own = split.positions(topo.context_parallel_rank) if split.context_size > 1 else torch.arange(size - 1)
        return PairBatch(
            Batch.shifted(tokens, mask[:, 1:], firsts, topo),
            texts[:, 1:][:, own].to(topo.device),
            owners[opened],
            weights.expand_as(owners)[opened].to(topo.device),
        )

    def sizes(self, batch: PairBatch) -> dict[str, int]:  # type: ignore[override]
        """Tokens of whole sequences, and sequences."""
        return super().sizes(batch.sequences)

    def forward_step(  # type: ignore[override]
        self, batches: Iterator[PairBatch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        """One forward of one pipeline stage; signature and result as megatron-core's schedules want them."""
        batch = next(batches)
        output, _ = super().forward_step(iter([batch.sequences]), model)
        return output, partial(self.loss, batch)

    def loss(  # type: ignore[override]
        self, batch: PairBatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of the pairs' losses, number of pairs, and the report: float64 [terms, 2]."""
        mask, count = batch.sequences.loss_mask, len(batch.keys)
        log_probs = -self.token_losses(logits, batch.sequences.labels) * mask
        own = torch.stack([log_probs, mask], dim=-1).flatten(0, 1)
        sums = own.new_zeros(2 * max(count, 1), 2).index_add(0, batch.texts.flatten(), own)
        if self.cp_group.size() > 1:  # the gradient of each process's own labels is that of its part of the sums
            whole = sums.detach().clone()
            dist.all_reduce(whole, group=self.cp_group)
            sums = sums + (whole - sums.detach())
        policy, labels = sums.view(-1, 2, 2).unbind(-1)
        policy, labels = policy[:count], labels[:count].detach()
        counted = batch.counts * float(self.cp_group.rank() == 0)
        if self.recorded is not None:
            self._record(batch, policy * counted[:, None])
            return log_probs.sum() * 0, counted.sum().int(), logits.new_zeros(len(self.terms), 2, dtype=torch.float64)
        pairs = Pairs(policy, self._reference_of(batch.keys).to(policy), labels)
        losses = PREFERENCE_LOSSES[self.settings.loss](pairs, self.settings)
        if self.settings.sft_weight:
            losses = losses - self.settings.sft_weight * policy[:, 0] / labels[:, 0].clamp(min=1)
        total = (losses * batch.counts).sum() + log_probs.sum() * 0
        return total, counted.sum().round().int(), self._report(pairs, losses.detach(), counted)

    def _report(self, pairs: Pairs, losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Sum and count of each term over the pairs: float64 [terms, 2]."""
        ratios, policy = pairs.ratios.detach(), pairs.policy.detach()
        rewards = self.settings.beta * ratios
        margin = rewards[:, 0] - rewards[:, 1]
        terms = [losses, margin, (margin > 0).float(), *rewards.T, *policy.T, ratios.mean(dim=1)]
        sums = (torch.stack(terms).double() * counted).sum(dim=1)
        return torch.stack([sums, counted.double().sum().expand_as(sums)], dim=1)

    def _record(self, batch: PairBatch, policy: torch.Tensor) -> None:
        assert self.recorded is not None
        for key, values, counts in zip(batch.keys.tolist(), policy.detach().double().cpu(), batch.counts, strict=True):
            if counts:
                corpus, document = document_of(key)
                self.recorded[corpus][document] = values

    def _reference_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the reference, float64 [P, 2]."""
        found = [self.reference[corpus][document] for corpus, document in map(document_of, keys.tolist())]
        return torch.stack(found) if found else torch.zeros(0, 2)


OBJECTIVES["dpo"] = Dpo
