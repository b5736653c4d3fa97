"""The table of names: complete, exact in both directions, and strict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf import mapping
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
def test_published_tensors_are_all_expected(shared_dir: Path, name: str) -> None:
    config, tensors = golden.read(shared_dir, name)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FFN_type": "softmoe_v9"}, "FFN_type is 'softmoe_v9'"),
        ({"mlp_type": None}, "mlp_type is None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": 33}, "hidden_size = 33 is not divisible"),
    ],
)
def test_settings_without_a_model_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mapping.config_from_hf({**mapping.config_to_hf(BASE), **change}, "here")
    incomplete = mapping.config_to_hf(BASE)
    del incomplete["n_experts"]
    with pytest.raises(CheckpointError, match="here has no n_experts"):
        mapping.config_from_hf(incomplete, "here")
