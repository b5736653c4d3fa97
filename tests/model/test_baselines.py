"""The models that Soft-MoE is compared with: attention alone, and megatron-core's top-k mixture of experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steel_megatron.config import ModelConfig, ParallelConfig, RunConfig
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.hf.mapping import config_to_hf
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, compare, small_run, train

TOP_2: dict[str, Any] = {"ffn": "top_k_moe", "ffn_activation": "swiglu", "routing_mode": None}
ATTENTION: dict[str, Any] = {"ffn": "none", "routing_mode": None}


def loss_and_gradients(model: ModelConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """A top-k layer by megatron-core: its weights, its result for fixed tokens, gradients of its sum of squares."""
    from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    stage = build_model(model, initialize(ParallelConfig()), seed=1)
    layer = stage.decoder.layers[0].mlp
    weights = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    y, bias = layer(tokens(model))
    assert bias is None
    y.square().sum().backward()
    return weights, y.detach(), [weight.grad for weight in layer.parameters()]


def tokens(model: ModelConfig) -> torch.Tensor:
    return torch.randn(24, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))


def plain_top_k(model: ModelConfig, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same written down: every expert on every token, and all but the best k shares 0."""
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    x = tokens(model)
    logits = x @ weights["router.weight"].T
    best = logits.topk(model.moe_top_k, dim=-1)
    likely = logits.softmax(-1).gather(-1, best.indices) if model.moe_top_k == 1 else best.values.softmax(-1)
    shares = torch.zeros_like(logits).scatter(-1, best.indices, likely)
    y = torch.zeros_like(x)
    for expert in range(model.num_experts):
        name = f"experts.local_experts.{expert}.linear_fc"
        gate, value = (x @ weights[f"{name}1.weight"].T).chunk(2, dim=-1)
        y = y + shares[..., expert : expert + 1] * ((F.silu(gate) * value) @ weights[f"{name}2.weight"].T)
    # Switch Transformer, equation 4: share of tokens times mean probability, summed over experts; here for k choices.
    count = x.size(0) * x.size(1)
    chosen = (shares > 0).flatten(0, 1).sum(0)
    probabilities = logits.softmax(-1).flatten(0, 1)
    balance = model.num_experts * (chosen / (count * model.moe_top_k) * probabilities.mean(0)).sum()
    # The schedule divides by the number of tokens afterwards, as it does for the loss.
    (y.square().sum() + model.moe_aux_loss_coeff * balance * count).backward()
    return y.detach(), [weight.grad for weight in weights.values() if weight.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_is_what_it_says(k: int) -> None:
    model = small_run(ParallelConfig(), **TOP_2, moe_top_k=k, moe_aux_loss_coeff=0.5).model
    weights, theirs, their_gradients = run_distributed(loss_and_gradients, 1, model)[0]
    ours, gradients = plain_top_k(model, weights)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)
    assert len(their_gradients) == len(gradients) == 1 + 2 * model.num_experts
    for (name, _), theirs_one, ours_one in zip(weights.items(), their_gradients, gradients, strict=True):
        torch.testing.assert_close(theirs_one, ours_one, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("tp2", ATTENTION),
        ("pp2", ATTENTION),
        ("tp2 pp2", ATTENTION),
        ("pp2", TOP_2),
    ],
)
def test_layouts_train_alike(layout: str, model: dict[str, Any]) -> None:
    whole = run_distributed(train, 1, small_run(ParallelConfig(), steps=4, **model))[0]
    compare(run_distributed(train, PROCESSES[layout], small_run(LAYOUTS[layout], steps=4, **model)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("model", [ATTENTION, TOP_2], ids=["none", "top_k_moe"])
def test_checkpoints_go_on_under_another_layout(model: dict[str, Any], tmp_path: Path) -> None:
    alone, pipeline = (
        small_run(parallel, str(tmp_path / "run"), steps=4, **model) for parallel in (ParallelConfig(), LAYOUTS["pp2"])
    )
    whole = run_distributed(train, 1, small_run(ParallelConfig(), steps=4, **model))[0]
    run_distributed(train, 1, alone, 1, 2, True)
    compare(run_distributed(train, 2, pipeline, 3, 4, False, True), whole[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_activation": "double_swiglu"}, "double_swiglu; the experts of ffn = top_k_moe are megatron-core's own"),
        ({"moe_top_k": 5}, "moe_top_k = 5 is over num_experts = 4"),
        ({"moe_top_k": 0}, "moe_top_k is 0; it must be at least 1"),
        ({"moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff is -1.0; it must be at least 0"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_run(ParallelConfig(), **{**TOP_2, **change})


@pytest.mark.parametrize("model", [ATTENTION, TOP_2], ids=["none", "top_k_moe"])
def test_they_are_causal_and_have_no_published_form(model: dict[str, Any]) -> None:
    settings = small_run(ParallelConfig(), **model).model
    assert settings.causal and settings.loss_name == "loss"
    with pytest.raises(CheckpointError, match=f"has no ffn = {settings.ffn}; it has soft_moe and dense"):
        config_to_hf(settings)


def scales(run: RunConfig) -> list[float]:
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    stage = build_model(run.model, initialize(run.parallel), seed=1)
    return [weight.item() for name, weight in stage.named_parameters() if name.endswith("mlp.scale")]


def test_the_routing_scale_begins_where_it_is_told() -> None:
    run = small_run(ParallelConfig())
    assert run_distributed(scales, 1, run)[0] == [1.0] * 4
    model = dataclasses.replace(run.model, routing_scale_init=8.0)
    assert run_distributed(scales, 1, dataclasses.replace(run, model=model))[0] == [8.0] * 4


def deviations(models: list[ModelConfig]) -> list[dict[str, float]]:
    """The standard deviation of each initial matrix of the first layer's feed-forward part."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    topology = initialize(ParallelConfig())
    return [
        {
            name: weight.std().item()
            for name, weight in build_model(model, topology, seed=1).decoder.layers[0].named_parameters()
            if weight.dim() > 1
        }
        for model in models
    ]


def test_experts_may_begin_larger_than_the_rest() -> None:
    soft = small_run(ParallelConfig(), expert_init_method_std=0.3).model
    dense = small_run(ParallelConfig(), ffn="dense", expert_init_method_std=0.3).model
    for found in run_distributed(deviations, 1, [soft, dense])[0]:
        for name, deviation in found.items():
            larger = name.startswith(("mlp.experts.", "mlp.network."))
            assert deviation == pytest.approx(0.3 if larger else 0.1, rel=0.15), name
        assert any(name.startswith(("mlp.experts.", "mlp.network.")) for name in found)


def experts_of_first_layer(run: RunConfig) -> torch.Tensor:
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    return build_model(run.model, initialize(run.parallel), seed=1).decoder.layers[0].mlp.experts.up.detach()


@pytest.mark.slow
def test_experts_may_begin_as_copies_of_one() -> None:
    alone, parallel = (small_run(layout, identical_expert_init=True) for layout in (ParallelConfig(), LAYOUTS["ep2"]))
    whole = run_distributed(experts_of_first_layer, 1, alone)[0]
    assert all(torch.equal(one, whole[0]) for one in whole) and whole.std() > 0.05
    assert torch.equal(torch.cat(run_distributed(experts_of_first_layer, 2, parallel)), whole)
    # They do not stay so: routing gives them different gradients.
    changed = run_distributed(trained_experts, 1, alone)[0]
    assert (changed[1:] - changed[0]).abs().max() > 1e-3


def trained_experts(run: RunConfig) -> torch.Tensor:
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine
    from tests.train.small_run import own_batches

    topology = initialize(run.parallel)
    engine = Engine(run, topology)
    for step in range(1, 5):
        engine.step(own_batches(run, step, topology))
    return engine.stage.decoder.layers[0].mlp.experts.up.detach()
