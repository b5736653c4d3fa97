"""The exported model's code: the published model's numbers, and decoding with a cache that equals the full forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from steel_megatron.config import routing_facts, routing_mode_names
from steel_megatron.hf import modeling_steel
from steel_megatron.hf.configuration_steel import ROUTING_MODES, SteelConfig
from steel_megatron.hf.modeling_steel import (
    CACHE,
    SteelCache,
    SteelForCausalLM,
    SteelSoftMoE,
    is_refresh,
    network,
    products,
    refreshes_before,
)
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
def test_published_models(name: str) -> None:
    config, tensors = golden.read(name)
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


def plain_soft_moe(layer: SteelSoftMoE, x: torch.Tensor) -> torch.Tensor:
    """The definition token by token, [T, d] to [T, d], without the shared expert."""
    phi = layer.phi.flatten(1)
    keys = layer.scale * phi / phi.norm(dim=0)
    normalized = x / x.norm(dim=1, keepdim=True)
    mixed = normalized if layer.mix == "normalized" else x
    slots_of_one = phi.size(1) // len(layer.experts)

    def slots_of(count: int) -> torch.Tensor:
        return (normalized[:count] @ keys).softmax(0).T @ mixed[:count]

    def shares_of(vector: torch.Tensor) -> torch.Tensor:
        return (vector / vector.norm() @ keys).softmax(0).view(-1, slots_of_one).sum(1)

    rows = []
    for t in range(len(x)):
        if layer.mode == "token":
            results = torch.stack([expert(mixed[t]) for expert in layer.experts])
            rows.append(shares_of(x[t]) @ results)
        elif layer.mode == "merged":
            start = t // layer.block * layer.block
            shares = shares_of(mixed[start - layer.block : start].mean(0) if start else mixed[0])
            matrices = zip(*(expert.matrices() for expert in layer.experts), strict=True)
            merged = tuple(torch.einsum("e,eij->ij", shares, torch.stack(m)) for m in matrices)
            rows.append(network(x[t], products(merged)))
        else:
            if layer.mode == "sequence":
                count = len(x)
            else:
                points = {2**power for power in range(10) if 2**power < layer.block}
                points |= {layer.block * number for number in range(1, len(x) + 1)}
                count = max((point for point in points if point <= max(t, 1)), default=1)
            slots = slots_of(count)
            results = torch.stack([layer.experts[j // slots_of_one](slot) for j, slot in enumerate(slots)])
            rows.append((normalized[t] @ keys).softmax(0) @ results)
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("mix", ["raw", "normalized"])
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_a_layer_computes_its_definition(mode: str, mix: str) -> None:
    for block in (1, 4, 6, 64):
        for length in (1, 2, LENGTH):
            model = small_model(mode, mix, routing_block_length=block, shared_expert_intermediate_size=0).double()
            layer = model.model.layers[0].mlp
            layer.scale.fill_(3.0)
            x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            y, _ = layer(x, torch.ones(2, length, dtype=torch.bool), None, False)
            expected = torch.stack([plain_soft_moe(layer, row) for row in x])
            torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)


def test_the_shared_expert_is_added() -> None:
    model = small_model("token").double()
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    y, _ = layer(x, torch.ones(1, 5, dtype=torch.bool), None, False)
    torch.testing.assert_close(y[0], plain_soft_moe(layer, x[0]) + layer.shared_expert(x[0]))


def decode(model: SteelForCausalLM, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a text whose first ``prompt`` tokens come together and the others one by one."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model(ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    logits = [out.logits]
    for position in range(prompt, ids.size(1)):
        one, seen = ids[:, position : position + 1], mask[:, : position + 1]
        out = model(one, attention_mask=seen, **{CACHE: out[CACHE]})
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("block", [1, 4, 6, 64])
@pytest.mark.parametrize("mix", ["raw", "normalized"])
@pytest.mark.parametrize("mode", CAUSAL)
def test_decoding_with_a_cache_equals_the_full_forward(mode: str, mix: str, block: int) -> None:
    # In float64, where nothing but a wrong state can make a difference, at weights that make the layers matter.
    model, ids = small_model(mode, mix, routing_block_length=block).double(), tokens()
    full = model(ids, use_cache=False).logits
    assert full.std() > 0.5
    for prompt in range(1, min(2 * block + 3, LENGTH - 1) + 1):  # all places in a block, and the edges of two
        torch.testing.assert_close(decode(model, ids, prompt), full, atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_decoding_with_a_cache_in_float32(mode: str) -> None:
    model, ids = small_model(mode, initializer_range=0.1), tokens()
    full = model(ids, use_cache=False).logits
    for prompt in (1, 6, 11):
        torch.testing.assert_close(decode(model, ids, prompt), full, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_a_prompt_may_come_in_chunks(mode: str) -> None:
    model, ids = small_model(mode).double(), tokens()
    cache, mask = SteelCache(model.config), torch.ones_like(ids)
    mask[1, :6] = 0  # the second row begins in the third chunk
    full = model(ids, attention_mask=mask, use_cache=False).logits
    for _ in range(2):
        pieces, seen = [], 0
        for part in ids.split([4, 1, 9, 9], dim=1):
            seen += part.size(1)
            pieces.append(model(part, attention_mask=mask[:, :seen], **{CACHE: cache}).logits)
        logits = torch.cat(pieces, 1)
        torch.testing.assert_close(logits[0], full[0], atol=1e-11, rtol=0)
        torch.testing.assert_close(logits[1, 6:], full[1, 6:], atol=1e-11, rtol=0)
        cache.reset()  # and once more with the emptied cache


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_padding_takes_no_part(mode: str) -> None:
    model, ids = small_model(mode).double(), tokens()
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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_decoding_a_left_padded_batch(mode: str) -> None:
    model, ids = small_model(mode).double(), tokens(3)
    mask = torch.ones_like(ids)
    padding = (0, 2, 5)
    for row, columns in enumerate(padding):
        mask[row, :columns] = 0
    alone = [model(ids[row : row + 1, columns:], use_cache=False).logits[0] for row, columns in enumerate(padding)]
    for prompt in range(1, 2 * 6 + 4):  # the last row begins after some of these prompts
        logits = decode(model, ids, prompt, mask)
        for row, columns in enumerate(padding):
            torch.testing.assert_close(logits[row, columns:], alone[row], atol=1e-11, rtol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_rows_may_be_reordered_while_decoding(mode: str) -> None:
    # As beam search does: after each token the rows are chosen anew, some twice, some not at all.
    model, ids = small_model(mode).double(), tokens(3)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    generator = torch.Generator().manual_seed(3)
    for prompt in range(4, 2 * 6 + 4):
        text, seen = ids[:, :prompt], mask[:, :prompt]
        out = model(text, attention_mask=seen, use_cache=True)
        for position in range(prompt, LENGTH):
            rows = torch.randint(3, (3,), generator=generator)
            out[CACHE].reorder_cache(rows)
            text = torch.cat((text[rows], ids[:, position : position + 1]), 1)
            seen = torch.cat((seen[rows], mask[:, position : position + 1]), 1)
            out = model(text[:, -1:], attention_mask=seen, **{CACHE: out[CACHE]})
        full = model(text, attention_mask=seen, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(out.logits, full, atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_rows_may_be_repeated_and_dropped(mode: str) -> None:
    model, ids = small_model(mode).double(), tokens()
    full = model(ids, use_cache=False).logits
    cache = model(ids[:, :9], use_cache=True)[CACHE]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    logits = model(ids[[1, 0], 9:], **{CACHE: cache}).logits
    torch.testing.assert_close(logits, full[[1, 0], 9:], atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_only_sequence_sees_later_tokens(mode: str) -> None:
    model, ids = small_model(mode), tokens(1)
    changed = ids.clone()
    changed[:, 13:] = (changed[:, 13:] + 7) % 50
    before, after = (model(text, use_cache=False).logits[:, :13] for text in (ids, changed))
    assert torch.equal(before, after) == (mode != "sequence")


@pytest.mark.slow
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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_generation_from_a_left_padded_batch(mode: str, use_cache: bool) -> None:
    model, ids = small_model(mode), tokens()[:, :9].clone()
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    together = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(together[0], model.generate(ids[:1], **settings)[0])
    assert torch.equal(together[1, 4:], model.generate(ids[1:, 4:], **settings)[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", CAUSAL)
def test_generation_goes_on_from_a_cache(mode: str) -> None:
    model, ids = small_model(mode), tokens(1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = model.generate(ids[:, :8], return_dict_in_generate=True, **settings)
    assert isinstance(first[CACHE], SteelCache)
    second = torch.cat((first.sequences, ids[:, :5]), 1)
    expected = model.generate(second, use_cache=False, **settings)
    assert torch.equal(model.generate(second, **{CACHE: first[CACHE]}, **settings), expected)
    assert torch.equal(model.generate(second, prefill_chunk_size=4, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CAUSAL, "sequence"])
def test_a_saved_model_is_the_same(mode: str, tmp_path: Path) -> None:
    model = small_model(mode, expert_intermediate_size=10)
    assert model.model.layers[0].mlp.experts[0].up_proj.weight.shape == (10, 32)
    model.save_pretrained(tmp_path)
    again = SteelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.config.to_dict() == {
        **model.config.to_dict(),
        "_name_or_path": again.config.to_dict()["_name_or_path"],
    }


@torch.no_grad()
def test_what_else_a_forward_gives() -> None:
    model, ids = small_model("merged"), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, out.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert model.train()(ids).get(CACHE) is None  # no state is kept in training


@torch.no_grad()
def test_speculation_only_where_tokens_can_be_taken_back() -> None:
    ids = tokens(1)[:, :8]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = small_model("token")
    speculated = model.generate(ids, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(speculated, model.generate(ids, **settings))
    model = small_model("merged")
    with pytest.raises(ValueError, match="takes tokens back"):
        model.generate(ids, prompt_lookup_num_tokens=3, **settings)
    with pytest.raises(NotImplementedError, match="running sums"):
        model(ids, use_cache=True)[CACHE].crop(-2)


def routing_bytes(cache: SteelCache) -> int:
    """Of everything that a cache holds beside attention's keys and values."""
    states = [vars(state).values() for state in cache.routing if state is not None]
    values = [part for state in states for value in state for part in (value if isinstance(value, tuple) else (value,))]
    return sum(value.nbytes for value in values if value is not None)


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    slots, width, inner, layers, rows = 6, 32, 24, 2, 2
    expected = {  # float32, and an int64 count for each row and layer
        "token": 0,
        "block_causal": layers * rows * (8 + 4 * slots * (2 + 2 * width)),
        "merged": layers * rows * (8 + 4 * (width + 4 * width * inner)),
    }
    for mode in CAUSAL:
        model, ids = small_model(mode), tokens(rows, 60)
        out = model(ids[:, :5], use_cache=True)
        for position in range(5, 60):
            one = ids[:, position : position + 1]
            out = model(one, **{CACHE: out[CACHE]})
            assert routing_bytes(out[CACHE]) == expected[mode]
        assert routing_bytes(model(ids, use_cache=True)[CACHE]) == expected[mode]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block_causal", "merged"])
def test_a_prompt_s_memory_is_bounded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(mode).double(), tokens(2, 60)
    whole = model(ids, use_cache=False).logits
    # Room for three segments' merged matrices, or for some tokens' slots.
    limit = 3 * 8 * 4 * 32 * 24
    monkeypatch.setattr(modeling_steel, "CHUNK_BYTES", limit)
    sizes = []

    def note(matrices: tuple[torch.Tensor, ...]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        sizes.append(sum(matrix.nbytes for matrix in matrices))
        return products(matrices)

    monkeypatch.setattr(modeling_steel, "products", note)
    torch.testing.assert_close(model(ids, use_cache=False).logits, whole, atol=1e-11, rtol=0)
    assert max(sizes, default=0) == (limit if mode == "merged" else 0)
    torch.testing.assert_close(decode(model, ids[:, :23], 17), whole[:, :23], atol=1e-11, rtol=0)


def test_refresh_points_are_the_library_s() -> None:
    for block in (1, 3, 6, 8, 64):
        points = [point for point in range(1, 200) if is_refresh(torch.tensor(point), block)]
        assert points == refresh_points(200, block) == refreshes_before(200, block)


def test_the_exported_code_and_the_library_say_the_same_of_modes() -> None:
    assert ROUTING_MODES.keys() == SteelSoftMoE.FORWARD.keys() <= set(routing_mode_names())
    for name, facts in ROUTING_MODES.items():
        assert facts.causal == routing_facts(name).causal, name
        assert facts.running_sums == (SteelSoftMoE.FORWARD[name][1] is not None), name


def test_labels_are_shifted() -> None:
    model, ids = small_model("block_causal"), tokens()
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="routing_mode is 'blocks'"):
        SteelConfig(routing_mode="blocks")
    with pytest.raises(ValueError, match="33 is not divisible by 4"):
        SteelConfig(hidden_size=33, num_attention_heads=4)
    with pytest.raises(ValueError, match="routing_block_length is 0"):
        SteelConfig(routing_block_length=0)
    with pytest.raises(ValueError, match="of type 'yarn'"):
        SteelConfig(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6})
    assert SteelConfig(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}).rope_theta == 5000.0
    with pytest.raises(ValueError, match="at least one token"):
        small_model("merged")(tokens()[:, :0])
    embedded = small_model("sequence").model.embed_tokens(tokens())
    with pytest.raises(ValueError, match="give input_ids"):
        small_model("sequence").generate(inputs_embeds=embedded, max_new_tokens=2)
    with pytest.raises(ValueError, match="must be a SteelCache"):
        small_model("merged")(tokens(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask must be"):
        small_model("merged")(tokens(), attention_mask=torch.ones(2, 3))
    cache = small_model("token")(tokens(), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="not causal"):
        small_model("sequence")(tokens(), **{CACHE: cache})
