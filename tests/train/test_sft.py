"""The weights of labels in supervised finetuning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steel_megatron.train.objective import Sft, SftPerSample

STARTS = np.array([[0, 0, 0, 3, 3, 5, 5], [0, 0, 0, 0, 0, 5, 5]])
LABELS = np.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
DOCUMENTS = np.array([[7, 7, 7, 2, 2, -1, -1], [4, 4, 4, 4, 4, -1, -1]])
ALONE: Any = SimpleNamespace(parallel=SimpleNamespace(context_parallel_size=1), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("objective", "counts", "first", "second", "items"),
    [
        (Sft, None, [1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], 4),
        (SftPerSample, None, [0.5, 0.5, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], 3),
        (Sft, [[1.0], [0.0]], [1, 1, 0, 1, 0, 0], [0] * 6, 3),
        (SftPerSample, [[0.0], [1.0]], [0] * 6, [0, 0, 0, 1, 0, 0], 1),
    ],
)
def test_weights(objective: Any, counts: Any, first: list[float], second: list[float], items: int) -> None:
    tokens = np.arange(14).reshape(2, 7)
    given = None if counts is None else torch.tensor(counts)
    batch = objective.batch(tokens, STARTS, given, ALONE, LABELS, DOCUMENTS)
    assert batch.loss_mask.tolist() == [first, second] and batch.items.item() == items
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert batch.document_starts.tolist() == STARTS[:, :-1].tolist()
