"""The model as a whole: its size, its causality, its initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from steel_megatron.config import ModelConfig, ParallelConfig, RunConfig, from_dict
from steel_megatron.model.flops import training_flops_per_token
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, MODEL, small_run

RECIPE = Path(__file__).resolve().parents[2] / "examples/steel_1b/pretrain.yaml"


def count_parameters(model: ModelConfig) -> int:
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    topology = initialize(ParallelConfig())
    with torch.device("meta"):
        stage = build_model(model, topology)
    assert all(parameter.is_meta for parameter in stage.parameters())
    return sum(parameter.numel() for parameter in stage.parameters())


def test_the_paper_s_recipe_has_the_published_number_of_parameters() -> None:
    recipe = from_dict(RunConfig, yaml.safe_load(RECIPE.read_text(encoding="utf-8")), str(RECIPE))
    assert run_distributed(count_parameters, 1, recipe.model) == [1_122_922_770]


def earlier_logits(model: ModelConfig, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of positions before 13, for a text and for one that differs from position 13 on."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    stage = build_model(model, initialize(ParallelConfig()), precision, seed=3)  # type: ignore[arg-type]
    tokens = torch.randint(0, model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[1] = tokens[0]
    tokens[1, 13:] = (tokens[0, 13:] + 7) % model.vocab_size
    rotated: list[torch.dtype] = []
    for layer in stage.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda _, arguments: rotated.extend(tensor.dtype for tensor in arguments[:2])
        )
    with torch.no_grad():
        logits = stage(tokens, torch.arange(24).expand(2, 24), None)
    assert rotated == [torch.float32] * 2 * model.num_layers  # queries and keys (Steel-LLM, section 4)
    return logits[0, :13], logits[1, :13]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["block_causal", "token", "merged", "sequence"])
def test_causal_modes_see_no_later_token(mode: str, precision: str) -> None:
    model = small_run(ParallelConfig(), routing_mode=mode, slots_per_expert=1).model
    before, after = run_distributed(earlier_logits, 1, model, precision)[0]
    assert torch.equal(before, after) == (mode != "sequence")


def local_weights(run: RunConfig) -> dict[str, Any]:
    """Slices of this process's initial weights, by global name and offset."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.model.weights import sharded_weights
    from steel_megatron.parallel.topology import initialize

    stage = build_model(run.model, initialize(run.parallel), seed=run.training.seed)
    return {
        f"{sharded.key} {sharded.global_offset}": sharded.data.detach().clone()
        for sharded in sharded_weights(stage).values()
    }


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_layout() -> None:
    whole = run_distributed(local_weights, 1, small_run(ParallelConfig()))[0]
    experts = whole["decoder.layers.mlp.experts.up (0, 0, 0, 0, 0)"]
    assert experts.std() == pytest.approx(MODEL.init_method_std, rel=0.05)
    assert not torch.equal(experts[0], experts[1])
    tensor_parallel = run_distributed(local_weights, 2, small_run(LAYOUTS["tp2"]))
    halves = [
        part[f"decoder.layers.mlp.experts.up (0, 0, 0, {12 * rank}, 0)"] for rank, part in enumerate(tensor_parallel)
    ]
    assert torch.equal(torch.cat(halves, dim=2), experts)
    pipeline = run_distributed(local_weights, 2, small_run(LAYOUTS["pp2"]))
    for stage in pipeline:
        for name, weight in stage.items():
            assert torch.equal(weight, whole[name]), name
    assert set(pipeline[0]) | set(pipeline[1]) == set(whole)


def test_padding_of_the_vocabulary_is_zero() -> None:
    embedding = run_distributed(local_weights, 1, small_run(ParallelConfig()))[0][
        "embedding.word_embeddings.weight (0, 0)"
    ]
    assert embedding.shape == (128, 32)
    assert embedding[100:].abs().max() == 0 and embedding[99].abs().max() > 0


def test_flops_of_a_dense_model_are_six_per_weight_and_token() -> None:
    model = ModelConfig(
        ffn="dense",
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        vocab_size=128,
        sequence_length=8,
    )
    weights = 2 * (4 * 64 * 64 + 4 * 64 * 96) + 64 * 128
    scores = 2 * 8 * 64  # half of the square of positions, twice
    assert training_flops_per_token(model) == 6 * (weights + scores)


def test_flops_of_the_modes_are_ordered() -> None:
    modes = ("sequence", "block_causal", "merged", "token")
    flops = [training_flops_per_token(small_run(ParallelConfig(), routing_mode=mode).model) for mode in modes]
    assert flops[0] < flops[1] < flops[3] and flops[2] < flops[3]
