"""The table of names: complete, exact in both directions, and strict."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf import mapping, weights
from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.modeling_steel import SteelForCausalLM
from tests.hf import golden

BASE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    num_experts=3,
    slots_per_expert=2,
    routing_mode="block_causal",
    shared_expert_intermediate_size=16,
    vocab_size=100,
    sequence_length=64,
)
MODELS = {
    "double_swiglu": BASE,
    "swiglu": dataclasses.replace(BASE, ffn_activation="swiglu"),
    "no shared expert": dataclasses.replace(BASE, shared_expert_intermediate_size=0, num_query_groups=None),
    "dense": dataclasses.replace(BASE, ffn="dense", routing_mode=None, shared_expert_intermediate_size=0),
}


def random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in mapping.published_shapes(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_are_exact(name: str) -> None:
    published = random_tensors(MODELS[name])
    own = mapping.from_hf(published, MODELS[name], "here")
    again = mapping.to_hf(own, MODELS[name])
    assert again.keys() == published.keys()
    for key, tensor in published.items():
        assert torch.equal(again[key], tensor), key
    assert own["embedding.word_embeddings.weight"].shape == (128, 32)
    assert own["embedding.word_embeddings.weight"][100:].abs().max() == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_settings_are_exact_in_both_directions(seed: int) -> None:
    choose = random.Random(seed)
    groups, queries = choose.choice([1, 2, 3]), choose.choice([1, 2, 4])
    heads, size = groups * queries, choose.choice([2, 6, 8])
    dense = seed % 4 == 0
    model = ModelConfig(
        num_layers=choose.randint(1, 3),
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn="dense" if dense else "soft_moe",
        ffn_activation="double_swiglu" if seed % 2 else "swiglu",
        ffn_hidden_size=choose.randint(1, 20),
        num_experts=choose.randint(1, 5),
        slots_per_expert=choose.randint(1, 3),
        routing_mode=None if dense else choose.choice(["sequence", "token", "block_causal", "merged"]),
        slot_input=choose.choice(["raw", "normalized"]),
        shared_expert_intermediate_size=0 if dense else choose.choice([0, 5]),
        vocab_size=choose.randint(1, 300),
        make_vocab_size_divisible_by=choose.choice([1, 8, 128]),
    )
    published = random_tensors(model)
    own = mapping.from_hf(published, model, "here")
    for rule in mapping.rules(model):
        assert own[rule.key].shape == ((model.num_layers, *rule.shape) if rule.per_layer else rule.shape)
    again = mapping.to_hf(own, model)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())
    settings = mapping.config_from_hf(mapping.config_to_hf(model), "here")
    assert dataclasses.replace(settings, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by) == model


def test_rows_of_queries_keys_and_values_go_by_group() -> None:
    # 4 heads in 2 groups of head size 8: megatron-core's rows are q0 q1 k0 v0, q2 q3 k1 v1.
    tensors = random_tensors(BASE)
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    rows = mapping.from_hf(tensors, BASE, "here")["decoder.layers.self_attention.linear_qkv.weight"][1]
    assert torch.equal(rows, torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_exported_code(name: str) -> None:
    model = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(MODELS[name])))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == mapping.published_shapes(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_settings_survive_both_directions(name: str) -> None:
    again = mapping.config_from_hf(mapping.config_to_hf(MODELS[name]), "here")
    assert dataclasses.replace(again, num_query_groups=None) == dataclasses.replace(MODELS[name], num_query_groups=None)
    assert again.query_groups == MODELS[name].query_groups


@pytest.mark.parametrize("name", golden.NAMES)
def test_published_tensors_are_all_expected(name: str) -> None:
    config, tensors = golden.read(name)
    model = mapping.config_from_hf(config, name)
    again = mapping.to_hf(mapping.from_hf(tensors["model"], model, name), model)
    assert again.keys() == tensors["model"].keys()
    for key, tensor in tensors["model"].items():
        assert torch.equal(again[key], tensor), key


def test_tensors_that_do_not_fit_are_named() -> None:
    tensors = random_tensors(BASE)
    name = "model.layers.1.mlp.experts.2.gate_down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"here has no tensor {name}; .* \[32, 24\]"):
        mapping.from_hf({key: value for key, value in tensors.items() if key != name}, BASE, "here")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[100, 31\]; its settings say \[100, 32\]"):
        mapping.from_hf({**tensors, "lm_head.weight": torch.zeros(100, 31)}, BASE, "here")
    with pytest.raises(CheckpointError, match=r"model.extra, which no model"):
        mapping.from_hf({**tensors, "model.extra": torch.zeros(1)}, BASE, "here")
    with pytest.raises(CheckpointError, match=rf"{name} is bfloat16, .*0.gate_down_proj.weight is float32"):
        mapping.from_hf({**tensors, name: tensors[name].bfloat16()}, BASE, "here")


def test_checkpoint_tensors_that_do_not_fit_are_named() -> None:
    own = mapping.from_hf(random_tensors(BASE), BASE, "here")
    with pytest.raises(CheckpointError, match=r"decoder.layers.mlp.phi has shape \[1, 32, 3, 2\]; .* \[2, 32, 3, 2\]"):
        mapping.to_hf({**own, "decoder.layers.mlp.phi": own["decoder.layers.mlp.phi"][:1]}, BASE)
    del own["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"has no tensor output_layer\.weight"):
        mapping.to_hf(own, BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FFN_type": "softmoe_v9"}, "FFN_type is 'softmoe_v9'"),
        ({"mlp_type": None}, "mlp_type is None"),
        ({"hidden_size": 33}, "hidden_size = 33 is not divisible"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"mlp_div_ratio": 0}, "mlp_div_ratio is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be a whole number"),
        ({"intermediate_size": 24.5}, "intermediate_size is 24.5; it must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "norm_epsilon is nan"),
        ({"routing_mode": "blocks"}, "routing_mode is 'blocks'"),
        ({"rope_theta": 10000.5}, "rope_theta is 10000.5"),
        ({"rope_parameters": 5}, "rope_parameters is 5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "of type 'yarn'"),
    ],
)
def test_settings_without_a_model_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mapping.config_from_hf({**mapping.config_to_hf(BASE), **change}, "here")


def test_settings_in_other_words() -> None:
    published = mapping.config_to_hf(BASE)
    incomplete = dict(published)
    del incomplete["n_experts"]
    with pytest.raises(CheckpointError, match="here has no n_experts"):
        mapping.config_from_hf(incomplete, "here")
    in_5 = {**published, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert mapping.config_from_hf(in_5, "here").rotary_base == 5000
    wide = {**published, "intermediate_size": 96, "mlp_div_ratio": 4}
    assert mapping.config_from_hf(wide, "here").ffn_hidden_size == 24
    assert mapping.config_from_hf({**wide, "expert_intermediate_size": 10}, "here").ffn_hidden_size == 10
    plain = {key: value for key, value in published.items() if not key.startswith(("routing", "shared"))}
    model = mapping.config_from_hf({**plain, "num_key_value_heads": None}, "here")
    assert (model.routing_mode, model.slot_input) == ("sequence", "normalized")
    assert model.query_groups == 4 and model.shared_expert_intermediate_size == 0


def test_settings_that_the_exported_code_does_not_know() -> None:
    with pytest.raises(CheckpointError, match=r"code does not know model\.megatron\.softmax_scale = 0\.1"):
        mapping.config_to_hf(dataclasses.replace(BASE, megatron={"softmax_scale": 0.1}))
    mapping.config_to_hf(dataclasses.replace(BASE, megatron={"recompute_granularity": "full"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 8)
    largest = torch.finfo(dtype).max
    for shape in ((4, 5), (0, 5)):
        weights.check_finite("a", torch.full(shape, largest, dtype=dtype), "here")
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 7, 19):
            tensor = torch.zeros(4, 5, dtype=dtype)
            tensor.view(-1)[place] = value
            with pytest.raises(CheckpointError, match="here: a holds values that are not finite"):
                weights.check_finite("a", tensor, "here")
