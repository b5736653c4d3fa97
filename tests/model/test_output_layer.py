"""The loss of the output layer, chunk by chunk, against cross entropy of whole logits in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steel_megatron.model import output_layer
from steel_megatron.model.embedding import _Rows
from steel_megatron.model.output_layer import _LinearCrossEntropy

TOKENS, HIDDEN, ROWS, VOCABULARY = 23, 8, 48, 41
ALONE: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, matrix = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (TOKENS, ROWS))
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 5 != 4)
    return hidden.requires_grad_(), matrix.requires_grad_(), labels, weights


def reference(
    hidden: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0
) -> list[Any]:
    hidden, matrix = (tensor.detach().double().requires_grad_() for tensor in (hidden, matrix))
    logits = (hidden @ matrix.t())[:, :VOCABULARY]
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    total = losses @ weights.double()
    return [total.detach(), *torch.autograd.grad(total, (hidden, matrix))]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.detach().double() - exact).norm() / exact.norm())


@pytest.fixture(params=[1, 7, 64])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk: one, a number that leaves a rest, and more than there are."""
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 4 * ROWS * request.param)
    monkeypatch.setattr(output_layer, "LEAST_TOKENS", {2: 1, 4: 1})
    return int(request.param)


@pytest.mark.parametrize(("incoming", "smoothing"), [(1.0, 0.0), (0.25, 0.0), (1.0, 0.1), (0.25, 0.9)])
def test_loss_and_gradients_are_those_of_whole_logits(chunks: int, incoming: float, smoothing: float) -> None:
    hidden, matrix, labels, weights = tensors()
    total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True, smoothing)
    (total * incoming).backward()
    exact, to_hidden, to_matrix = reference(hidden, matrix, labels, weights, smoothing)
    assert error(total, exact) < 1e-6
    assert hidden.grad is not None and error(hidden.grad, incoming * to_hidden) < 1e-6
    assert matrix.grad is not None and error(matrix.grad, incoming * to_matrix) < 1e-6
    assert not matrix.grad[VOCABULARY:].any()  # padding


def test_float16_keeps_gradients_that_only_the_loss_scale_makes_large_enough() -> None:
    hidden, matrix, labels, weights = tensors(torch.float16)
    weights, scale = weights * 1e-5, torch.tensor([2.0**14])
    total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, scale, True)
    to_hidden, to_matrix = torch.autograd.grad(total * scale[0], (hidden, matrix))
    _, exact_hidden, exact_matrix = reference(hidden, matrix, labels, weights)
    assert error(to_hidden.double() / 2**14, exact_hidden) < 2e-3
    assert error(to_matrix.double() / 2**14, exact_matrix) < 2e-3


def test_bfloat16_adds_chunks_in_float32(chunks: int) -> None:
    hidden, matrix, labels, weights = tensors(torch.bfloat16)
    total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True)
    exact, to_hidden, to_matrix = reference(hidden, matrix, labels, weights)
    own_hidden, own_matrix = torch.autograd.grad(total, (hidden, matrix))
    assert error(total, exact) < 3e-3
    assert error(own_hidden, to_hidden) < 6e-3 and error(own_matrix, to_matrix) < 6e-3


def test_large_logits_overflow_nothing() -> None:
    hidden, matrix, labels, weights = tensors()
    hidden = (hidden * 500).detach().requires_grad_()
    total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True)
    exact, to_hidden, _ = reference(hidden, matrix, labels, weights)
    (own_hidden,) = torch.autograd.grad(total, hidden)
    assert error(total, exact) < 1e-6 and error(own_hidden, to_hidden) < 1e-5


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, matrix, labels, weights = tensors()
    with torch.no_grad():
        total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, False)
    assert not total.requires_grad and error(total, reference(hidden, matrix, labels, weights)[0]) < 1e-6


def test_the_matrix_gradient_is_added_to_the_sums_of_data_parallelism(chunks: int) -> None:
    hidden, matrix, labels, weights = tensors()
    matrix.main_grad = torch.ones(ROWS, HIDDEN)  # type: ignore[attr-defined]
    for _ in range(2):
        _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True).backward()
    exact = reference(hidden, matrix, labels, weights)[2]
    assert matrix.grad is None
    assert error(matrix.main_grad - 1, 2 * exact) < 2e-6  # type: ignore[attr-defined]
    total = _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True)
    with pytest.raises(RuntimeError, match="nonzero"):  # the sums hold the gradient of the loss, and of nothing else
        (total * 0.5).backward()


def test_a_frozen_matrix_gets_no_gradient() -> None:
    hidden, matrix, labels, weights = tensors()
    matrix = matrix.detach()
    matrix.main_grad = torch.zeros(ROWS, HIDDEN)  # type: ignore[attr-defined]
    _LinearCrossEntropy.apply(hidden, matrix, labels, weights, VOCABULARY, ALONE, None, True).mul(0.5).backward()
    assert not matrix.main_grad.any() and hidden.grad is not None  # type: ignore[attr-defined]
    assert error(hidden.grad, reference(hidden, matrix, labels, weights)[1] / 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_embedding_are_added_up(dtype: torch.dtype) -> None:
    matrix = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    matrix.main_grad = torch.ones(ROWS, HIDDEN)  # type: ignore[attr-defined]
    ids = torch.tensor([[3, 3, 0, 9], [3, 1, 47, 2]])
    inside = ids != 9
    rows = _Rows.apply(ids, inside, matrix)
    factors = torch.randn_like(rows)
    (rows * factors).sum().backward()
    expected = torch.ones(ROWS, HIDDEN).index_add(0, ids[inside], factors[inside].float())
    assert matrix.grad is None and not rows[~inside].any() and torch.equal(rows[inside], matrix[ids[inside]])
    assert torch.allclose(matrix.main_grad, expected, rtol=0, atol=1e-6)  # type: ignore[attr-defined]
