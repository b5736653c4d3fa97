"""FLOPs per token by formula, against torch's count of what a forward pass really multiplies."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steel_megatron.config import ModelConfig, ParallelConfig
from steel_megatron.model.flops import multiplications_per_token, training_flops_per_token
from tests.distributed import run_distributed

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    num_experts=4,
    slots_per_expert=2,
    block_length=8,
    vocab_size=128,
    sequence_length=48,
    routing_mode="block_causal",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"ffn": "none"},
    "dense double": {"ffn": "dense"},
    "dense swiglu": {"ffn": "dense", "ffn_activation": "swiglu"},
    "top 2": {"ffn": "top_k_moe", "ffn_activation": "swiglu"},
    "top 3": {"ffn": "top_k_moe", "ffn_activation": "swiglu", "moe_top_k": 3},
    "sequence": {"routing_mode": "sequence"},
    "block_causal": {},
    "block_causal, long blocks": {"block_length": 64},
    "block_causal, shared": {"shared_expert_intermediate_size": 16, "ffn_activation": "swiglu"},
    "token": {"routing_mode": "token", "slots_per_expert": 1},
    "merged": {"routing_mode": "merged", "slots_per_expert": 1, "block_length": 16},
    "merged, ragged": {"routing_mode": "merged", "block_length": 20, "shared_expert_intermediate_size": 8},
}


def counted(models: list[ModelConfig]) -> list[int]:
    """Multiplications and additions that torch counts in a forward pass over one sequence; 0 of them in our kernels."""
    from steel_megatron.model.spec import build_model
    from steel_megatron.parallel.topology import initialize

    topology = initialize(ParallelConfig())
    totals = []
    for model in models:
        stage = build_model(model, topology, seed=1)
        positions = torch.arange(model.sequence_length)[None]
        # torch's counter does not know the fused attention of the CPU.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            stage(positions % model.vocab_size, positions, None)
        totals.append(counter.get_total_flops())
    return totals


@pytest.mark.slow
def test_formula_and_count_agree() -> None:
    models = [dataclasses.replace(MODEL, **changes) for changes in VARIANTS.values()]
    for name, model, total in zip(VARIANTS, models, run_distributed(counted, 1, models)[0], strict=True):
        parts = multiplications_per_token(model)
        # torch counts whole squares of scores, of which a causal kernel needs half.
        expected = 2 * model.sequence_length * (sum(parts.values()) + parts["scores"])
        routing = 2 * model.sequence_length * parts["routing"]
        padded = -model.sequence_length % model.block_length if model.routing_mode == "merged" else 0
        extra = 2 * padded * 4 * model.hidden_size * model.ffn_hidden_size * model.num_layers
        # How much of the routing torch sees depends on whether kernels or plain PyTorch do it.
        assert expected - routing <= total <= expected + extra + 2 * routing, name
        assert routing < 0.2 * expected, name
        if model.ffn != "soft_moe":
            assert total == expected, name


def test_training_is_three_forward_passes() -> None:
    assert training_flops_per_token(MODEL) == 6 * sum(multiplications_per_token(MODEL).values())


@pytest.mark.parametrize("mode", ["sequence", "block_causal", "merged", "token"])
def test_more_experts_cost_more(mode: str) -> None:
    few = dataclasses.replace(MODEL, routing_mode=mode, slots_per_expert=1)
    many = dataclasses.replace(few, num_experts=8)
    assert training_flops_per_token(few) < training_flops_per_token(many)
    experts = [multiplications_per_token(model)["experts"] for model in (few, many)]
    network = few.num_layers * 4 * few.hidden_size * few.ffn_hidden_size
    if mode == "token":
        assert experts == [4 * network, 8 * network]
    if mode == "merged":
        assert experts == [network * (1 + 4 / 8), network * (1 + 8 / 8)]
    if mode == "sequence":
        assert experts == [network * 4 / 48, network * 8 / 48]
    if mode == "block_causal":  # refreshes at 1, 2, 4, 8, 16, 24, 32, 40
        assert experts == [network * 8 * 4 / 48, network * 8 * 8 / 48]


def test_frozen_weights_have_no_gradients_to_compute() -> None:
    parts = multiplications_per_token(MODEL)
    products = parts["attention"] + parts["experts"] + parts["output"]
    assert training_flops_per_token(MODEL) - training_flops_per_token(MODEL, frozen=True) == 2 * products
