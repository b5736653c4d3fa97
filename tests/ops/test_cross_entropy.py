"""Cross entropy of rows of logits, compiled and by torch, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steel_megatron.ops import cross_entropy
from tests.needs import compiled

ROWS, WIDTH, COLUMNS = 7, 2600, 2500
"""More than two blocks of the kernel, and a rest; the columns above are padding."""
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(params=[pytest.param("compiled", marks=compiled.mark), "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cross_entropy, "available", lambda: False)
    return str(request.param)


def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels (one of another process before, one after) and factors."""
    generator = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(ROWS, WIDTH, generator=generator)).to(dtype)
    labels = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    labels[2], labels[3], labels[4], labels[5] = -5, WIDTH + 3, COLUMNS - 1, 1024
    return values, labels, 0.5 + torch.rand(ROWS, generator=generator)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_statistics_and_gradient_are_those_of_float64(dtype: torch.dtype, smoothing: float, way: str) -> None:
    values, labels, factors = logits(dtype)
    exact = values[:, :COLUMNS].double().requires_grad_()
    here = (labels >= 0) & (labels < COLUMNS)
    picked = exact.gather(1, labels.where(here, 0)[:, None]).squeeze(1) * here
    lse = torch.logsumexp(exact, 1)
    loss = lse - (1 - smoothing) * picked - smoothing * exact.mean(1)
    (to_logits,) = torch.autograd.grad(loss @ factors.double(), exact)
    own = cross_entropy.statistics(values, labels, COLUMNS)
    assert own.dtype == torch.float32
    assert torch.allclose(own.double(), torch.stack((lse, picked, exact.sum(1))).detach(), rtol=1e-6, atol=2e-4)
    assert torch.allclose(own[0].double(), lse.detach(), rtol=3e-7, atol=0)
    cross_entropy.gradient_(values, labels, COLUMNS, own[0], factors, smoothing, COLUMNS)
    assert not values[:, COLUMNS:].any()
    error = (values[:, :COLUMNS].double() - to_logits).norm() / to_logits.norm()
    assert error < BOUNDS[dtype]


def test_float32_loss_is_torchs(way: str) -> None:
    values, labels, _ = logits(torch.float32)
    labels = labels.clamp(0, COLUMNS - 1)
    lse, picked, _ = cross_entropy.statistics(values, labels, COLUMNS)
    expected = F.cross_entropy(values[:, :COLUMNS].double(), labels, reduction="none")
    assert torch.allclose((lse - picked).double(), expected, rtol=0, atol=2e-6)


def test_a_process_that_has_padding_alone(way: str) -> None:
    values, labels, factors = logits(torch.float32)
    own = cross_entropy.statistics(values, labels, 0)
    assert torch.isneginf(own[0]).all() and not own[1:].any()
    cross_entropy.gradient_(values, labels, 0, torch.zeros(ROWS), factors, 0.0, COLUMNS)
    assert not values.any()


@pytest.mark.parametrize("extreme", [1e4, float("nan")])
def test_extreme_logits(extreme: float, way: str) -> None:
    values, labels, _ = logits(torch.float32)
    values[1, 17] = extreme
    lse = cross_entropy.statistics(values, labels, COLUMNS)[0]
    assert torch.equal(lse.isnan(), values[:, :COLUMNS].isnan().any(1))
    assert lse[0].isfinite() and (extreme != extreme or lse[1] == extreme)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_sums_are_exact_in_float32(dtype: torch.dtype, way: str) -> None:
    generator = torch.Generator().manual_seed(1)
    total, addend = (torch.randn(40_003, generator=generator).to(one) for one in (torch.float32, dtype))
    expected = total + addend.float()
    cross_entropy.add_(total, addend)
    assert torch.equal(total, expected)
