"""What trainers and adapters do with an exported model: packed documents, adapters, recomputation, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorWithFlattening

from steel_megatron.hf import modeling_steel
from steel_megatron.hf.modeling_steel import CACHE, SteelForCausalLM, documents_of, rotary_angles
from tests.hf.test_modeling import CAUSAL, small_model, tokens

MODES = (*CAUSAL, "sequence", "dense")
LENGTHS = (7, 1, 12, 3)
"""Of the packed documents; 23 tokens."""


def model_of(mode: str) -> SteelForCausalLM:
    model = small_model("merged", FFN_type="raw") if mode == "dense" else small_model(mode)
    return model.double()


def in_one_row(way: str) -> dict[str, torch.Tensor]:
    """Arguments that mark documents of ``LENGTHS`` in a row."""
    lengths = torch.tensor(LENGTHS)
    ends = lengths.cumsum(0)
    everything = {
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)[None].int(),
        "cu_seq_lens_q": torch.cat((torch.zeros(1), ends)).int(),
    }
    return {way: everything[way]}


@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_documents_do_not_see_each_other(mode: str, way: str) -> None:
    model, ids = model_of(mode), tokens(1)
    packed = model(ids, **in_one_row(way)).logits
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)
    parameters = list(model.parameters())
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(3), dtype=packed.dtype)
    gradients = [torch.autograd.grad((logits * weights).sum(), parameters) for logits in (packed, alone)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert (packed - model(ids).logits).abs().max() > 0.1  # the documents do change each other otherwise


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_collator_of_transformers_packs(mode: str) -> None:
    model, ids = model_of(mode), tokens(1)[0]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": part.tolist()} for part in ids.split(LENGTHS)])
    packed = model(**batch)
    alone = torch.cat([model(part).logits for part in ids[None].split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed.logits, alone, atol=1e-10, rtol=0)
    assert packed.loss.isfinite() and packed.get(CACHE) is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_with_padding(mode: str) -> None:
    """Two rows with other documents each, padding in front of, between and behind them."""
    model, ids = model_of(mode), tokens(2)
    spans = [[(2, 9), (9, 20)], [(0, 4), (6, 7), (7, 21)]]
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, documents in enumerate(spans):
        for start, end in documents:
            mask[row, start:end] = 1
            positions[row, start:end] = torch.arange(end - start)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, documents in enumerate(spans):
        for start, end in documents:
            alone = model(ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(logits[row, start:end], alone, atol=1e-10, rtol=0)


def test_documents_are_found() -> None:
    real = torch.ones(2, 6, dtype=torch.bool)
    assert documents_of(real, torch.arange(6)[None]) is None
    assert documents_of(real, torch.arange(3, 9)[None]) is None  # goes on from elsewhere
    found = documents_of(real, torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]))
    assert found is not None and found.tolist() == [[0, 0, 0, 1, 1, 1], [2] * 6]
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    assert documents_of(padded, torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 1, 2, 3, 4]])) is None
    found = documents_of(real, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]] * 2))
    assert found is not None and found.tolist() == [[0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3]]


class Times(nn.Module):
    """Stands in the place of a linear layer and doubles what it computes."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inside(x)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_train_and_merge(mode: str) -> None:
    model, ids = model_of(mode), tokens()
    plain = model(ids).logits.detach()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    generator = torch.Generator().manual_seed(3)
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(names)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    out = adapted(ids, labels=ids)
    out.loss.backward()
    for name, parameter in adapters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name in names:  # each one moves the logits
        weight = adapters[f"base_model.model.{name}.lora_B.default.weight"]
        with torch.no_grad():
            kept = weight.clone()
            weight.zero_()
            assert (adapted(ids).logits - out.logits).abs().max() > 1e-4, name
            weight.copy_(kept)
    assert (out.logits - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, out.logits, atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_what_stands_in_a_projection_s_place_is_called(mode: str) -> None:
    """Wrappers and hooks on each projection of a network change the output as other weights do."""
    model, ids = model_of(mode), tokens()
    network = model.model.layers[0].mlp if mode == "dense" else model.model.layers[0].mlp.experts[1]
    for name in network.names:
        projection = getattr(network, name)
        projection.weight *= 2
        doubled = model(ids).logits
        projection.weight /= 2
        hook = projection.register_forward_hook(lambda module, given, result: 2 * result)
        torch.testing.assert_close(model(ids).logits, doubled, atol=1e-10, rtol=0)
        hook.remove()
        setattr(network, name, Times(projection))
        torch.testing.assert_close(model(ids).logits, doubled, atol=1e-10, rtol=0)
        setattr(network, name, projection)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, ids = model_of(mode).train(), tokens()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_eager_attention_is_sdpa_and_shows_its_weights(mode: str) -> None:
    model, ids = model_of(mode), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    packed = {"position_ids": in_one_row("position_ids")["position_ids"]}
    expected, together = model(ids, attention_mask=mask).logits, model(ids, **packed).logits
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(out.logits[mask.bool()], expected[mask.bool()], atol=1e-10, rtol=0)
    torch.testing.assert_close(model(ids, **packed).logits, together, atol=1e-10, rtol=0)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 4, 23, 23)
    weights = out.attentions[1][0, :, 5:]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights[..., :5].any() and not weights.triu(6).any()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_any_attention_shows_its_weights(implementation: str) -> None:
    """Whatever computes it otherwise, as the eager one: with padding, packed documents, and a cache."""
    model, ids = model_of("merged"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    calls: list[dict[str, Any]] = [{"attention_mask": mask}, in_one_row("position_ids")]
    results = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        outs = [model(ids, **call, output_attentions=True) for call in calls]
        cache = model(ids[:, :15], use_cache=True, output_attentions=True)[CACHE]
        outs.append(model(ids[:, 15:], **{CACHE: cache}, output_attentions=True))
        assert model.config._attn_implementation == name
        results.append([(out.logits, *out.attentions) for out in outs])
    for shown, expected in zip(*results, strict=True):
        for found, value in zip(shown, expected, strict=True):
            assert found.equal(value)
    assert [weights.shape[2:] for weights in results[1][2][1:]] == [(8, 23)] * 2


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_graph_is_whole(mode: str) -> None:
    """torch.compile without graph breaks, and torch.export."""
    model, ids = model_of(mode), tokens()
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-10, rtol=0)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    torch.testing.assert_close(exported(ids, use_cache=False).logits, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_documents_without_positions_begin_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary attention depends on distances alone, so that only the positions themselves can show it."""
    seen = []

    def note(positions: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(positions)
        return rotary_angles(positions, *rest)

    monkeypatch.setattr(modeling_steel, "rotary_angles", note)
    model_of("dense")(tokens(1), **in_one_row("seq_idx"))
    assert seen[0].equal(in_one_row("position_ids")["position_ids"])


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_masks_of_four_axes(mode: str) -> None:
    """They say what each token sees, where routing does not depend on it as well."""
    model, ids = model_of(mode), tokens()
    length = ids.size(1)
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[10:, 4] = False
    if mode not in ("dense", "token"):
        with pytest.raises(ValueError, match=rf"four axes; routing_mode '{mode}' also routes by what is padding"):
            model(ids, attention_mask=sees.expand(2, 1, -1, -1), use_cache=False)
        return
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 50
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        added = torch.where(sees, 0.0, float("-inf")).to(torch.float64)
        given = {"attention_mask": (added if attention == "eager" else sees).expand(2, 1, -1, -1), "use_cache": False}
        found, other = (model(text, **given).logits for text in (ids, changed))
        plain = model(ids, use_cache=False).logits
        # Up to there it is the causal mask; of a text's first layer, later tokens do not see token 4.
        torch.testing.assert_close(found[:, :10], plain[:, :10], atol=1e-10, rtol=0)
        assert (found[:, 10:] - plain[:, 10:]).abs().max() > 0.01
        first, second = (model(text, **given, output_hidden_states=True).hidden_states[1] for text in (ids, changed))
        torch.testing.assert_close(first[:, 10:], second[:, 10:], atol=1e-10, rtol=0)
        assert (found[:, 4:10] - other[:, 4:10]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache(mode: str) -> None:
    model, ids = model_of(mode), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    if mode in ("block_causal", "merged"):
        with pytest.raises(ValueError, match=f"'static' has no place for the routing of routing_mode '{mode}'"):
            model.generate(ids, **settings, cache_implementation="static")
    else:
        expected = model.generate(ids, **settings, use_cache=False)
        assert model.generate(ids, **settings, cache_implementation="static").equal(expected)
    again = model.generate(ids, **settings, cache_implementation="dynamic")
    assert again.equal(model.generate(ids, **settings))
