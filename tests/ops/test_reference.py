"""The routing mathematics against their definition, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steel_megatron.errors import ConfigError
from steel_megatron.ops import combine, dispatch, expert_weights, merge_weights, mixed_tokens, reference


def inputs(batch: int, length: int, width: int, experts: int, slots: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    phi = torch.randn(width, experts, slots, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0], dtype=torch.float64)
    return x, phi, scale


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def logit(token: torch.Tensor, phi: torch.Tensor, scale: float, expert: int, slot: int) -> float:
    key = phi[:, expert, slot]
    return float(scale * torch.dot(token / token.norm(), key / key.norm()))


def test_refresh_points_double_and_then_follow_blocks() -> None:
    assert reference.refresh_points(20, 4) == [1, 2, 4, 8, 12, 16]
    assert reference.refresh_points(13, 6) == [1, 2, 4, 6, 12]
    assert reference.refresh_points(16, 4) == [1, 2, 4, 8, 12]
    assert reference.refresh_points(3, 1) == [1, 2]
    assert reference.refresh_points(1, 8) == [1]


@given(length=st.integers(1, 70), block_length=st.integers(1, 40))
def test_a_token_reads_the_last_refresh_before_it(length: int, block_length: int) -> None:
    refresh = reference.refresh_points(length, block_length)
    blocks = reference.block_of_token(length, refresh)
    for token, block in enumerate(blocks):
        assert block == max(k for k, point in enumerate(refresh) if point <= max(token, 1))


@pytest.mark.parametrize("mix", ["raw", "normalized"])
@pytest.mark.parametrize(("mode", "block_length"), [("sequence", None), ("block_causal", 4), ("block_causal", 3)])
def test_dispatch_and_combine_are_their_definition(mode: str, block_length: int | None, mix: str) -> None:
    x, phi, scale = inputs(2, 11, 5, 3, 2)
    slots, routing = dispatch(x, phi, scale, mode=mode, mix=mix, block_length=block_length)
    ends = [11] if mode == "sequence" else reference.refresh_points(11, block_length or 1)
    assert slots.shape == (2, len(ends), 3, 2, 5)
    outputs = torch.randn(slots.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = combine(outputs, routing)
    for b in range(2):
        tokens = list(x[b])
        mixed = [token / token.norm() if mix == "normalized" else token for token in tokens]
        for block, end in enumerate(ends):
            for e in range(3):
                for p in range(2):
                    shares = softmax([logit(token, phi, 3.0, e, p) for token in tokens[:end]])
                    expected = sum(share * vector for share, vector in zip(shares, mixed, strict=False))
                    torch.testing.assert_close(slots[b, block, e, p], expected)
        for t, token in enumerate(tokens):
            block = 0 if mode == "sequence" else max(k for k, end in enumerate(ends) if end <= max(t, 1))
            pairs = [(e, p) for e in range(3) for p in range(2)]
            shares = softmax([logit(token, phi, 3.0, e, p) for e, p in pairs])
            expected = sum(share * outputs[b, block, e, p] for share, (e, p) in zip(shares, pairs, strict=True))
            torch.testing.assert_close(y[b, t], expected)


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["raw", "normalized"])
@pytest.mark.parametrize("mode", ["sequence", "block_causal", "token"])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 3, 3, 3], [0, 1, 1, 1, 1, 5]]])
def test_gradients(mode: str, mix: str, documents: list[list[int]] | None) -> None:
    batch, document_starts = (1, None) if documents is None else (2, torch.tensor(documents))
    tensors = [tensor.requires_grad_() for tensor in inputs(batch, 6, 4, 2, 2)]

    def layer(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        slots, routing = dispatch(x, phi, scale, mode=mode, mix=mix, block_length=2, document_starts=document_starts)
        return combine(torch.tanh(slots), routing)

    assert torch.autograd.gradcheck(layer, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("mix_normalized", [True, False])
def test_gradients_of_every_result(mix_normalized: bool) -> None:
    """Slots, logits and log-sum-exp, with a gap, an empty block and two documents."""
    x, phi, scale = (tensor.requires_grad_() for tensor in inputs(2, 6, 4, 2, 1))
    starts, ends = torch.tensor([[0, 0, 3, 3], [1, 1, 1, 6]]), torch.tensor([[1, 2, 3, 6], [2, 2, 5, 6]])

    def results(x: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slots, logits, lse = reference.dispatch(x, reference.slot_keys(phi, scale), starts, ends, mix_normalized)
        return slots, logits, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(results, (x, phi, scale))


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(2, 24),
    block_length=st.integers(1, 12),
    cut=st.integers(1, 23),
    mode=st.sampled_from(["block_causal", "merged"]),
    mix=st.sampled_from(["raw", "normalized"]),
)
def test_nothing_depends_on_later_tokens(length: int, block_length: int, cut: int, mode: str, mix: str) -> None:
    cut = min(cut, length - 1)
    x, phi, scale = (tensor.float() for tensor in inputs(1, length, 4, 3, 1))
    changed = x.clone()
    changed[:, cut:] *= -100

    def earlier(tokens: torch.Tensor) -> torch.Tensor:
        if mode == "merged":
            shares = merge_weights(tokens, phi, scale, mix=mix, block_length=block_length)
            return shares.repeat_interleave(block_length, dim=1)[:, :cut]
        slots, routing = dispatch(tokens, phi, scale, mode=mode, mix=mix, block_length=block_length)
        return combine(torch.tanh(slots), routing)[:, :cut]

    assert torch.equal(earlier(x), earlier(changed))


def test_sequence_mode_sees_later_tokens() -> None:
    x, phi, scale = inputs(1, 8, 4, 3, 1)
    changed = x.clone()
    changed[:, -1] *= -100
    before, after = (dispatch(tokens, phi, scale, mode="sequence", mix="raw")[0] for tokens in (x, changed))
    assert not torch.allclose(before, after)


def test_merge_weights_follow_the_segment_before() -> None:
    x, phi, scale = inputs(1, 7, 4, 3, 2)
    shares = merge_weights(x, phi, scale, mix="raw", block_length=3)
    assert shares.shape == (1, 3, 3)
    for segment, vector in enumerate((x[0, 0], x[0, :3].mean(0), x[0, 3:6].mean(0))):
        every = softmax([logit(vector, phi, 3.0, e, p) for e in range(3) for p in range(2)])
        expected = [every[2 * e] + every[2 * e + 1] for e in range(3)]
        assert shares[0, segment].tolist() == pytest.approx(expected)


def test_expert_weights_sum_to_one() -> None:
    x, phi, scale = inputs(2, 5, 4, 3, 2)
    torch.testing.assert_close(expert_weights(x, phi, scale).sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(mixed_tokens(x, "normalized").norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    assert mixed_tokens(x, "raw") is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_stay_finite(dtype: torch.dtype) -> None:
    x, phi, _ = (tensor.to(dtype) for tensor in inputs(1, 9, 4, 3, 1))
    x[:, 2] = 0.0
    x[:, 3] = 1e4
    for mode in ("sequence", "block_causal"):
        slots, routing = dispatch(x, phi, torch.tensor([1e4], dtype=dtype), mode=mode, mix="raw", block_length=4)
        assert slots.dtype == dtype and slots.isfinite().all()
        assert combine(slots, routing).isfinite().all()


def test_bad_arguments_are_named() -> None:
    x, phi, scale = inputs(1, 4, 4, 2, 1)
    with pytest.raises(ConfigError, match="routing mode is 'blocks'"):
        dispatch(x, phi, scale, mode="blocks", mix="raw")
    with pytest.raises(ConfigError, match="routing mix is 'both'"):
        dispatch(x, phi, scale, mode="sequence", mix="both")
    with pytest.raises(ConfigError, match="block_length is 0"):
        dispatch(x, phi, scale, mode="block_causal", mix="raw", block_length=0)
    with pytest.raises(ConfigError, match="block_length is 0"):
        merge_weights(x, phi, scale, mix="raw", block_length=0)
    with pytest.raises(ConfigError, match=r"\[1, 4, 4\] and \[5, 2, 1\]"):
        dispatch(x, torch.ones(5, 2, 1), scale, mode="sequence", mix="raw")
    with pytest.raises(ConfigError, match=r"T >= 1"):
        dispatch(x[:, :0], phi, scale, mode="sequence", mix="raw")
    with pytest.raises(ConfigError, match=r"\[2\]"):
        dispatch(x, phi, torch.ones(2), mode="sequence", mix="raw")
    with pytest.raises(ConfigError, match=r"phi are torch.int64"):
        dispatch(x, phi.long(), scale)
    with pytest.raises(ConfigError, match=r"phi on meta"):
        dispatch(x, phi.to("meta"), scale)
    with pytest.raises(ConfigError, match=r"\[4, 0, 1\]"):
        dispatch(x, phi[:, :0], scale)
    with pytest.raises(ConfigError, match=r"document_starts is torch.int64 \[1, 3\]"):
        dispatch(x, phi, scale, document_starts=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"document_starts\[0, 2\] = 1; it must be 2"):
        dispatch(x, phi, scale, document_starts=torch.tensor([[0, 0, 1, 1]]))
    slots, routing = dispatch(x, phi, scale)
    with pytest.raises(ConfigError, match=r"got \[1, 1, 3, 1, 4\]"):
        combine(slots.new_ones(1, 1, 3, 1, 4), routing)
    with pytest.raises(ConfigError, match=r"outputs are torch.int64"):
        combine(slots.long(), routing)


@pytest.mark.parametrize("mode", ["sequence", "block_causal", "token"])
def test_no_sequences_give_no_results(mode: str) -> None:
    x, phi, scale = (tensor.float() for tensor in inputs(0, 5, 4, 3, 1))
    slots, routing = dispatch(x, phi, scale, mode=mode, block_length=2)
    assert combine(slots, routing).shape == (0, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_of_another_type_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, phi, scale = inputs(2, 9, 4, 3, 1)
    mixed, _ = dispatch(x.to(dtype), phi, scale.half(), mode="block_causal", mix="raw", block_length=4)
    same, _ = dispatch(x.to(dtype), phi.float(), scale.float(), mode="block_causal", mix="raw", block_length=4)
    torch.testing.assert_close(mixed, same)
    rounded = [tensor.to(dtype) for tensor in (x, phi, scale)]
    shares, exact = expert_weights(*rounded), expert_weights(*(tensor.double() for tensor in rounded))
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.double(), exact, rtol=1e-5, atol=1e-6)


def test_without_the_extension_everything_works_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from steel_megatron.ops import kernels, soft_moe

    x, phi, scale = (tensor.float() for tensor in inputs(2, 9, 5, 3, 1))
    slots, routing = dispatch(x, phi, scale, mode="block_causal", mix="raw", block_length=4)
    monkeypatch.setattr(kernels, "available", lambda: False)
    soft_moe._say_once_that_kernels_are_missing.cache_clear()
    messages: list[str] = []
    monkeypatch.setattr(soft_moe.logger, "info", messages.append)
    for _ in range(3):
        again, routing_again = dispatch(x, phi, scale, mode="block_causal", mix="raw", block_length=4)
    torch.testing.assert_close(again, slots)
    torch.testing.assert_close(combine(again, routing_again), combine(slots, routing))
    assert len(messages) == 1 and "compiled extension is not there" in messages[0]
