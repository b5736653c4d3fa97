"""The compiled kernels against the reference in float64: results, gradients, threads, and torch's own checks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.ops import kernels, reference

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the compiled extension is not built")


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one comparison; ``block_length`` None is mode ``sequence``."""

    batch: int
    length: int
    width: int
    experts: int
    slots: int
    block_length: int | None
    mix_normalized: bool
    dtype: torch.dtype = torch.float32
    scale: float = 3.0

    def plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Refresh points and each token's block."""
        if self.block_length is None:
            return torch.tensor([self.length]), torch.zeros(self.length, dtype=torch.int64)
        refresh = reference.refresh_points(self.length, self.block_length)
        return torch.tensor(refresh), torch.tensor(reference.block_of_token(self.length, refresh))

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """x in the case's type, and keys."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.length, self.width, generator=generator).to(self.dtype)
        phi = torch.randn(self.width, self.experts, self.slots, generator=generator)
        return x, reference.slot_keys(phi, torch.tensor([self.scale]))


NAMES = ("slots", "logits", "lse", "y", "grad x", "grad keys")


def layer(module: ModuleType, case: Case, x: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer whose experts are tanh, and the gradients of a fixed random loss; every number named."""
    refresh, blocks = case.plan()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, keys)]
    slots, logits, lse = module.dispatch(*leaves, refresh, case.mix_normalized)
    y = module.combine(torch.tanh(slots), logits, blocks)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator).to(case.dtype).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, weight)
    return dict(zip(NAMES, (slots, logits, lse, y, *gradients), strict=True))


def exact(case: Case, x: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reference in float64 on the same (rounded) inputs."""
    return layer(reference, case, x.double(), keys.double())


def assert_float32_close(
    ours: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Errors relative to the largest entry; one that cancels to nothing is held to the size of its terms, about 0.1."""
    for name in NAMES:
        size = max(right[name].abs().max().item(), 0.1)
        error = (ours[name].double() - right[name]).abs().max().item() / size
        assert error < tolerance, f"{name}: {error:.1e}"


CASES = [
    Case(2, 37, 19, 3, 2, None, True),
    Case(2, 37, 19, 3, 2, 5, False),
    Case(3, 600, 64, 6, 1, None, False),  # several pieces
    Case(2, 601, 70, 6, 1, 16, True),  # ragged last block, width no multiple of a vector
    Case(1, 300, 33, 2, 9, 7, False),  # more slots than a register block
    Case(1, 40, 5, 40, 2, 3, True),  # more slots than tokens
    Case(2, 9, 16, 1, 1, 1, False),  # a refresh for every token
    Case(1, 1, 8, 4, 1, None, False),  # one token
    Case(1, 1, 8, 4, 1, 8, True),
    Case(1, 2, 3, 1, 1, 64, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_the_reference(case: Case) -> None:
    tensors = case.tensors()
    assert_float32_close(layer(kernels, case, *tensors), exact(case, *tensors))


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(4, 70),
    experts=st.integers(1, 7),
    slots=st.integers(1, 3),
    block_length=st.one_of(st.none(), st.integers(1, 80)),
    mix_normalized=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_the_reference(seed: int, **shape: int) -> None:
    case = Case(**shape)  # type: ignore[arg-type]
    tensors = case.tensors(seed)
    assert_float32_close(layer(kernels, case, *tensors), exact(case, *tensors), 5e-5)


@pytest.mark.parametrize("block_length", [None, 16])
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_bfloat16_is_no_worse_than_eager(block_length: int | None, mix_normalized: bool) -> None:
    case = Case(2, 200, 96, 6, 1, block_length, mix_normalized, dtype=torch.bfloat16)
    tensors = case.tensors()
    right = exact(case, *tensors)
    ours, eager = (layer(module, case, *tensors) for module in (kernels, reference))
    for name in NAMES:
        assert ours[name].dtype == eager[name].dtype
        error, eager_error = ((result[name].double() - right[name]).norm().item() for result in (ours, eager))
        floor = 1e-6 * right[name].norm().item()  # of what is float32 in both
        assert error <= 1.02 * eager_error + floor, f"{name}: {error:.2e}, eager {eager_error:.2e}"


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_huge_logits_and_equal_tokens(block_length: int | None, mix_normalized: bool) -> None:
    case = Case(2, 23, 12, 3, 1, block_length, mix_normalized, scale=1e3)
    x, keys = case.tensors()
    x[:, 7:15] = x[:, 7:8]
    # A logit of 1e3 is only known to 1e-4 in float32, and its exponential no better.
    assert_float32_close(layer(kernels, case, x, keys), exact(case, x, keys), 1e-3)
    huge = layer(kernels, case, x, keys * 1e27)
    assert all(value.isfinite().all() for value in huge.values())


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_zero_vectors(block_length: int | None, mix_normalized: bool) -> None:
    case = Case(2, 23, 12, 3, 1, block_length, mix_normalized)
    x, keys = case.tensors()
    x[:, [0, 5, 22]] = 0.0
    ours, right = layer(kernels, case, x, keys), exact(case, x, keys)
    zero = (x == 0).all(-1)
    assert right["grad x"][zero].abs().max() > 1e9  # the gradient of x / 1e-12, as autograd has it
    torch.testing.assert_close(ours["grad x"][zero].double(), right["grad x"][zero], rtol=1e-3, atol=1e6)
    for result in (ours, right):
        result["grad x"] = result["grad x"].masked_fill(zero.unsqueeze(-1), 0.0)
    assert_float32_close(ours, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(1, 1100, 48, 6, 1, None, True), Case(2, 700, 48, 5, 2, 16, False)], ids=str)
def test_threads_do_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    x, keys = case.tensors()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer(kernels, case, x.to(dtype), keys))
    finally:
        torch.set_num_threads(threads)
    for name in ("slots", "logits", "lse", "y", "grad x"):
        assert torch.equal(results[0][name], results[1][name]) and torch.equal(results[0][name], results[2][name]), name


def test_threads_do_not_change_the_gradient_of_keys() -> None:
    case = Case(2, 1100, 48, 6, 1, 64, True)
    (x, keys), (refresh, _) = case.tensors(), case.plan()
    slots, logits, lse = kernels.dispatch(x, keys, refresh, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                torch.ops.steel_megatron.soft_moe_dispatch_backward(
                    torch.cos(slots), torch.cos(logits), x, keys, refresh, True, slots, logits, lse
                )[1]
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("length", [300, 33])
def test_later_tokens_do_not_change_a_bit(length: int) -> None:
    case = Case(1, length, 20, 4, 1, 8, False)
    x, keys = case.tensors()
    changed = x.clone()
    changed[:, length // 2 :] *= -50
    refresh, blocks = case.plan()
    results = []
    for tokens in (x, changed, x[:, : length // 2]):
        cut = tokens.size(1)
        seen = refresh[refresh < cut]
        slots, logits, _ = kernels.dispatch(tokens, keys, seen if cut < length else refresh, False)
        results.append(kernels.combine(torch.tanh(slots), logits, blocks[:cut])[:, : length // 2])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_inputs() -> None:
    case = Case(2, 30, 16, 3, 2, 7, False)
    x, keys = case.tensors()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)  # as the model hands it over: [T, B, d] in memory
    assert not strided.is_contiguous()
    ours, right = layer(kernels, case, strided, keys), layer(kernels, case, x, keys)
    assert all(torch.equal(ours[name], right[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_length", [None, 4])
def test_torch_accepts_the_operators(dtype: torch.dtype, block_length: int | None) -> None:
    case = Case(2, 11, 8, 3, 1, block_length, True)
    x, keys = case.tensors()
    refresh, blocks = case.plan()
    operators = torch.ops.steel_megatron
    x = x.to(dtype).requires_grad_()
    torch.library.opcheck(operators.soft_moe_dispatch, (x, keys.detach().requires_grad_(), refresh, True))
    slots, logits, lse = operators.soft_moe_dispatch(x.detach(), keys, refresh, True)
    outputs = slots.to(dtype, copy=True).requires_grad_()
    torch.library.opcheck(operators.soft_moe_combine, (outputs, logits.requires_grad_(), blocks))
    logits, outputs, x = logits.detach(), outputs.detach(), x.detach()
    arguments = (slots, logits, x, keys, refresh, True, slots, logits, lse)
    torch.library.opcheck(operators.soft_moe_dispatch_backward, arguments)
    torch.library.opcheck(operators.soft_moe_combine_backward, (x, outputs, logits, blocks))


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 5, 4, requires_grad=True)
    keys, refresh, blocks = torch.randn(4, 2), torch.tensor([5]), torch.zeros(5, dtype=torch.int64)
    slots, logits, _ = kernels.dispatch(x, keys, refresh, True)
    for value in (slots, kernels.combine(slots, logits, blocks)):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


def test_log_sum_exp_has_no_gradient() -> None:
    case = Case(1, 5, 4, 2, 1, None, True)
    x, keys = case.tensors()
    slots, logits, lse = kernels.dispatch(x.requires_grad_(), keys, case.plan()[0], True)
    assert slots.requires_grad and logits.requires_grad and not lse.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, dtype=torch.float16)}, "Half"),
        ({"x": torch.zeros(5, 4)}, r"\[5, 4\]"),
        ({"keys": torch.zeros(3, 2)}, r"\[3, 2\]"),
        ({"refresh": torch.tensor([2, 1])}, r"refresh\[1\] = 1"),
        ({"refresh": torch.tensor([0, 5])}, r"refresh\[0\] = 0"),
        ({"refresh": torch.tensor([3, 6])}, r"refresh\[1\] = 6"),
        ({"refresh": torch.tensor([3], dtype=torch.int32)}, "Int"),
    ],
    ids=str,
)
def test_bad_dispatch_arguments_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {"x": torch.ones(2, 5, 4), "keys": torch.ones(4, 2), "refresh": torch.tensor([2, 5])}
    with pytest.raises(RuntimeError, match=message):
        kernels.dispatch(**{**good, **change}, mix_normalized=True)


@pytest.mark.parametrize("blocks", [[0, 1, 0], [0, 1, 2], [-1, 0, 1], [0, 1]])
def test_bad_blocks_are_refused(blocks: list[int]) -> None:
    with pytest.raises(RuntimeError, match="block_of_token"):
        kernels.combine(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 3), torch.tensor(blocks))


def test_an_empty_batch_and_nan() -> None:
    slots, logits, _ = kernels.dispatch(torch.ones(0, 5, 4), torch.ones(4, 2), torch.tensor([5]), False)
    assert slots.shape == (0, 1, 2, 4) and logits.shape == (0, 5, 2)
    x = torch.ones(1, 5, 4)
    x[0, 3] = float("nan")
    assert kernels.dispatch(x, torch.ones(4, 2), torch.tensor([5]), False)[0].isnan().all()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_vectors_compute_the_same(capability: str) -> None:
    """What machines with less than this one run: the variable is read once, so in a process of its own."""
    root = Path(__file__).resolve().parents[2]
    check = "from tests.ops import test_kernels as t\nfor case in t.CASES: t.test_float32_is_the_reference(case)"
    run = subprocess.run(
        [sys.executable, "-c", check + "\nt.test_bfloat16_is_no_worse_than_eager(16, True)"],
        cwd=root,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
