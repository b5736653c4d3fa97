"""What the backward pass computes again changes no gradient, and leaves less in memory."""

from __future__ import annotations

import dataclasses
import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steel_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, routing_mode_names
from steel_megatron.errors import ConfigError
from steel_megatron.ops.reference import refresh_points
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, compare, own_batches, small_run, train

ALONE = ParallelConfig()
KINDS = ("none", "selective", "full", "routing")
MODES: dict[str, dict[str, Any]] = {
    "sequence": {"routing_mode": "sequence", "slot_input": "normalized", "expert_init_method_std": 0.5},
    "block_causal": {"routing_mode": "block_causal"},
    "token": {"routing_mode": "token"},
    "token normalized": {"routing_mode": "token", "slot_input": "normalized", "expert_init_method_std": 0.5},
    "merged": {"routing_mode": "merged"},
    "merged, short segments": {"routing_mode": "merged", "block_length": 3},
}


class Alive(TorchDispatchMode):
    """Counts the bytes of what operators made inside and is still there, whoever keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and leaf.untyped_storage()._cdata not in before:
                self._made[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return result

    @property
    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self._made.items() if not storage.expired())


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def with_recompute(kind: str, parallel: ParallelConfig = ALONE, **model: Any) -> RunConfig:
    return small_run(dataclasses.replace(parallel, recompute=kind), steps=2, **model)  # type: ignore[arg-type]


def measure(runs: dict[str, RunConfig], layer_only: bool) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """Of one forward and backward pass of each model, or of its first layer's Soft-MoE part: the bytes that are kept
    for the backward pass, and every gradient, that of the input included."""
    from steel_megatron.parallel.topology import initialize

    topology, found = initialize(ALONE), {}
    from steel_megatron.model.spec import build_chunks

    for name, run in runs.items():
        topology = initialize(run.parallel)
        (stage,) = build_chunks(run.model, topology, seed=1)
        module = stage.decoder.layers[0].mlp if layer_only else stage
        generator = torch.Generator().manual_seed(3)
        shape = (run.model.sequence_length, 3, run.model.hidden_size)
        x = torch.randn(shape, generator=generator).requires_grad_()
        tokens = torch.randint(0, run.model.vocab_size, shape[1::-1], generator=generator)
        positions = torch.arange(run.model.sequence_length).expand_as(tokens)
        with Alive() as alive:
            y = module(x)[0] if layer_only else module(tokens, positions, None)
            kept = alive.bytes
        (y * torch.linspace(-1, 1, y.size(-1))).square().sum().backward()
        gradients = {key: weight.grad for key, weight in module.named_parameters()}
        if layer_only:
            gradients["the input"] = x.grad
        found[name] = (kept, gradients)
    return found


@pytest.mark.slow
def test_routing_is_not_kept_and_gradients_are_the_same_bit_by_bit() -> None:
    """In every mode: the layer keeps its input's size less for the tokens' side, and nothing of it twice."""
    assert {mode["routing_mode"] for mode in MODES.values()} == set(routing_mode_names())
    runs = {
        f"{mode} {kind}": with_recompute(kind, num_layers=1, sequence_length=384, **model)
        for mode, model in MODES.items()
        for kind in ("none", "routing")
    }
    found = run_distributed(measure, 1, runs, True, timeout=250)[0]
    tokens = 384 * 3
    logits, vectors = tokens * 8 * 4, tokens * 32 * 4
    slots = len(refresh_points(384, 8)) * 3 * 8 * 32 * 4  # twice: by block, and by expert
    saved = {"sequence": logits, "block_causal": logits + 2 * slots, "token": logits + vectors, "merged": vectors}
    for mode in MODES:
        (before, plain), (after, again) = (found[f"{mode} {kind}"] for kind in ("none", "routing"))
        assert plain.keys() == again.keys()
        for key, gradient in plain.items():
            assert gradient.abs().max() > 0 and torch.equal(gradient, again[key]), (mode, key)
        assert before - after >= saved[MODES[mode]["routing_mode"]], (mode, before, after)


def test_the_whole_model_keeps_less() -> None:
    """Attention keeps its weights where they are dropped; full recomputation keeps little but the layers' inputs."""
    runs = {kind: with_recompute(kind, num_layers=2, attention_dropout=0.1) for kind in KINDS}
    found = run_distributed(measure, 1, runs, False, timeout=250)[0]
    kept = {kind: size for kind, (size, _) in found.items()}
    layers, heads, length = 2, 4, 24
    assert kept["none"] - kept["selective"] >= layers * 3 * heads * length * length * 4
    assert kept["routing"] < kept["none"] and kept["full"] < min(kept["selective"], kept["routing"]) / 2
    for kind, (_, gradients) in found.items():
        for key, gradient in found["none"][1].items():
            assert torch.equal(gradient, gradients[key]), (kind, key)


def several(runs: dict[Any, RunConfig]) -> dict[Any, list[Any]]:
    return {name: train(run) for name, run in runs.items()}


CHUNKS = ParallelConfig(
    tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
)
AGAIN = {"tp2 pp2 vpp2": CHUNKS, **{name: LAYOUTS[name] for name in ("cp2 tp2 sp", "cp2 pp2", "tp2 ep2")}}
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "block_causal": ({"hidden_dropout": 0.2, "attention_dropout": 0.1}, False),
    "sequence": ({"routing_mode": "sequence"}, False),
    "token": ({"routing_mode": "token"}, False),
    "merged": ({"routing_mode": "merged", "block_length": 3}, False),
    "documents": ({}, True),
    "merged documents": ({"routing_mode": "merged"}, True),
}


def run_of(variant: str, kind: str = "none", parallel: ParallelConfig = ALONE) -> RunConfig:
    model, packed = VARIANTS[variant]
    return dataclasses.replace(with_recompute(kind, parallel, **model), data=DataConfig(reset_at_eod=packed))


@cache
def alone() -> dict[str, list[Any]]:
    return run_distributed(several, 1, {variant: run_of(variant) for variant in VARIANTS})[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", AGAIN)
def test_layouts_compute_the_same_again(layout: str) -> None:
    """On four processes, with dropout and packed documents, after other micro batches of a pipeline: all of it as
    without recomputation, and as in one process."""
    # One launch for each layout: process groups of earlier runs stay, and their threads slow down the later ones.
    runs = {
        (variant, kind): run_of(variant, kind, AGAIN[layout])
        for variant in VARIANTS
        for kind in (KINDS if variant == "block_causal" else ("none", "routing"))
    }
    by_rank = run_distributed(several, 4, runs, timeout=250)
    for variant, kind in runs:
        compare([rank[variant, kind] for rank in by_rank], alone()[variant])
        for rank in by_rank:
            assert rank[variant, kind] == rank[variant, "none"], (variant, kind)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("some", {}, "recompute is 'some'; it must be one of none, selective, full, routing"),
        ("routing", {"ffn": "dense", "routing_mode": None}, "is routing, but model.ffn is dense: only soft_moe"),
        (
            "full",
            {"megatron": {"recompute_granularity": "selective"}},
            "is full, and model.megatron.recompute_granularity is 'selective'; set one of them",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_refused(kind: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_recompute(kind, **model)


def routes_twice(run: RunConfig) -> tuple[int, int, list[str]]:
    """How often a step calls the experts, and a mode, of a user's own mode that draws random numbers."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.model.routing import RoutingMode, register_routing_mode
    from steel_megatron.model.soft_moe import ParallelSoftMoE
    from steel_megatron.train.engine import Engine

    calls, experts = [], []

    class Noisy(RoutingMode):
        name, causal = "noisy", True

        def multiplications(self, model: ModelConfig, network: float) -> tuple[float, float]:
            return network, 0.0

        def forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            noise = torch.rand_like(x[..., :1])
            results = layer.run_experts((x * noise).reshape(1, -1, x.size(-1)))
            weights = torch.sigmoid(x @ layer.phi.mean(2) * layer.scale)
            return torch.einsum("bte,ebtd->btd", weights, results.reshape(-1, *x.shape)) * noise

    register_routing_mode(Noisy)
    plain = ParallelSoftMoE.run_experts

    def counted(self: Any, vectors: torch.Tensor, **keywords: Any) -> torch.Tensor:
        experts.append(1)
        return plain(self, vectors, **keywords)

    ParallelSoftMoE.run_experts = counted  # type: ignore[method-assign]
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, routing_mode="noisy"))
    figures = []
    for kind in ("none", "routing"):
        calls.clear()
        experts.clear()
        parallel = dataclasses.replace(run.parallel, recompute=kind)
        engine = Engine(dataclasses.replace(run, parallel=parallel), topology_of(parallel, topology))
        torch.manual_seed(7)
        done = engine.step(own_batches(run, 1, topology)[:1])
        figures.append(repr((done.loss, done.grad_norm)))
    return len(calls), len(experts), figures


def topology_of(parallel: ParallelConfig, topology: Any) -> Any:
    return dataclasses.replace(topology, parallel=parallel)


def test_a_mode_of_ones_own_draws_the_same_numbers_and_experts_compute_once() -> None:
    calls, experts, (plain, again) = run_distributed(routes_twice, 1, with_recompute("none", num_layers=2))[0]
    assert (calls, experts) == (4, 2)  # two layers
    assert plain == again
