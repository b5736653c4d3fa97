"""The exported model's code: the published model's numbers, and decoding with a cache that equals the full forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.modeling_steel import SteelCache, SteelForCausalLM, is_refresh
from steel_megatron.ops.reference import refresh_points
from tests.hf import golden

CAUSAL = ("block_causal", "merged", "token")
LENGTH = 23


def small_model(mode: str, mix: str = "raw", **changes: object) -> SteelForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 24,
        "mlp_div_ratio": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_experts": 3,
        "slots_per_expert": 2,
        "routing_mode": mode,
        "routing_mix": mix,
        "routing_block_length": 6,
        "shared_expert_intermediate_size": 16,
        "initializer_range": 0.3,
    }
    return SteelForCausalLM(SteelConfig(**{**settings, **changes})).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", golden.NAMES)
def test_published_models(shared_dir: Path, name: str) -> None:
    config, tensors = golden.read(shared_dir, name)
    del config["model_type"]  # the fixtures say "qwen2", as the published models do
    model = SteelForCausalLM(SteelConfig(**config))
    model.load_state_dict(tensors["model"])  # strict: the names are the published ones
    io = tensors["io"]
    logits = model(io["input_ids"]).logits
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), io["labels"].flatten())
    assert loss.item() == pytest.approx(io["loss"].item(), abs=2e-6)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert golden.relative_error(parameter.grad, tensors["grads"][parameter_name]) < 1e-4, parameter_name


@torch.no_grad()
@pytest.mark.parametrize("mix", ["raw", "normalized"])
@pytest.mark.parametrize("mode", CAUSAL)
def test_decoding_with_a_cache_equals_the_full_forward(mode: str, mix: str) -> None:
    model, ids = small_model(mode, mix), tokens()
    full = model(ids, use_cache=False).logits
    assert full.std() > 0.5
    for prompt in (1, 2, 3, 5, 6, 7, 12, 17, 22):
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits]
        for position in range(prompt, LENGTH):
            out = model(ids[:, position : position + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_a_prompt_may_come_in_chunks(mode: str) -> None:
    model, ids = small_model(mode), tokens()
    full, cache = model(ids, use_cache=False).logits, SteelCache(small_model(mode).config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([4, 1, 9, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_padding_takes_no_part(mode: str) -> None:
    model, ids = small_model(mode), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    alone = model(ids[1:, 5:], use_cache=False).logits[0]
    together = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(together[1, 5:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[0], model(ids[:1], use_cache=False).logits[0], atol=1e-4, rtol=0)
    right = torch.ones_like(ids)
    right[1, -5:] = 0
    kept = model(ids, attention_mask=right, use_cache=False).logits[1, :-5]
    torch.testing.assert_close(kept, model(ids[1:, :-5], use_cache=False).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("prompt", [6, 11])
def test_decoding_a_left_padded_batch(mode: str, prompt: int) -> None:
    model, ids = small_model(mode), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    out = model(ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    logits = [out.logits]
    for position in range(prompt, LENGTH):
        seen = mask[:, : position + 1]
        out = model(ids[:, position : position + 1], attention_mask=seen, past_key_values=out.past_key_values)
        logits.append(out.logits)
    row = torch.cat(logits, 1)[1, 5:]
    torch.testing.assert_close(row, model(ids[1:, 5:], use_cache=False).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_only_sequence_sees_later_tokens(mode: str) -> None:
    model, ids = small_model(mode), tokens(1)
    changed = ids.clone()
    changed[:, 13:] = (changed[:, 13:] + 7) % 50
    before, after = (model(text, use_cache=False).logits[:, :13] for text in (ids, changed))
    assert torch.equal(before, after) == (mode != "sequence")


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_generation_with_and_without_a_cache(mode: str, beams: int) -> None:
    model, ids = small_model(mode), tokens()[:, :5]
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)
    if beams == 1:
        text = ids
        for _ in range(12):
            text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(plain, text)


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    for mode in CAUSAL:
        model, sizes = small_model(mode), []
        for length in (8, 20):
            cache = model(tokens(1, length), use_cache=True).past_key_values
            state = cache.routing[0]
            parts = [] if state is None else [state.weighted, state.outputs, state.segment, *(state.merged or ())]
            sizes.append(sum(part.numel() for part in parts if part is not None))
        assert sizes[0] == sizes[1]


def test_refresh_points_are_the_library_s() -> None:
    for block in (1, 3, 6, 8, 64):
        points = [point for point in range(1, 200) if is_refresh(torch.tensor(point), block)]
        assert points == refresh_points(200, block)


def test_labels_are_shifted() -> None:
    model, ids = small_model("block_causal"), tokens()
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="routing_mode is 'blocks'"):
        SteelConfig(routing_mode="blocks")
    with pytest.raises(ValueError, match="must be a SteelCache"):
        small_model("merged")(tokens(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask must be"):
        small_model("merged")(tokens(), attention_mask=torch.ones(2, 3))
