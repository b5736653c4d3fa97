"""Supervised finetuning: cross entropy of the tokens that the labels of a corpus name, such as the assistant's."""

from __future__ import annotations

import numpy as np
import torch

from steel_megatron.data.indexed.labels import LABEL
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.objective.base import OBJECTIVES
from steel_megatron.train.objective.next_token import Batch, NextToken


class Sft(NextToken):
    """The mean over the label tokens of the global batch, however it is cut into micro batches and processes."""

    labelled, kind, items = True, "sft", "labels"

    @classmethod
    def batch(  # type: ignore[override]
        cls,
        samples: np.ndarray,
        starts: np.ndarray,
        counts: torch.Tensor | None,
        topo: Topology,
        labels: np.ndarray,
        documents: np.ndarray,
    ) -> Batch:
        """This process's part of a micro batch of whole, packed documents.

        Args:
            samples, starts, counts, topo: as for :meth:`steel_megatron.train.objective.Objective.batch`.
            labels: int64 [B, T + 1], bits of :data:`~steel_megatron.data.indexed.labels.LABEL`.
            documents: int64 [B, T + 1], a number for each token's document, -1 for padding.
        """
        tokens, counted = torch.from_numpy(samples), torch.from_numpy(labels & LABEL).float()
        counted[torch.from_numpy(starts == np.arange(starts.shape[1]))] = 0  # nothing comes before the first token
        if counts is not None:
            counted = counted * counts
        weights, items = cls.weigh(counted, torch.from_numpy(documents))
        return Batch.shifted(tokens, weights[:, 1:], torch.from_numpy(starts), topo, items)

    @classmethod
    def weigh(cls, counted: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each token's loss, and the sum over the batch that the sum of losses is divided by.

        Args:
            counted: float32 [B, T + 1], 1 for the tokens that are labels.
            documents: int64 [B, T + 1], as for :meth:`batch`.

        Returns:
            float32 [B, T + 1], and float32 [].
        """
        return counted, counted.sum()


class SftPerSample(Sft):
    """The mean over the conversations of the global batch of each one's mean over its label tokens."""

    items = "conversations"

    @classmethod
    def weigh(cls, counted: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each conversation's label tokens share a weight of 1; args and result as for :meth:`Sft.weigh`."""
        _, numbers = documents.flatten().unique(return_inverse=True)
        labels = torch.zeros(int(numbers.max()) + 1).index_add_(0, numbers, counted.flatten())
        weights = counted / labels.clamp(min=1)[numbers].view_as(counted)
        return weights, (labels > 0).sum().float()


OBJECTIVES["sft"] = Sft
OBJECTIVES["sft_per_sample"] = SftPerSample
