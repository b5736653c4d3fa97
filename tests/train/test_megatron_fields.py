"""The fields of megatron-core that may be set are read by the library's modules, and train."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steel_megatron.config import DataConfig, RunConfig
from steel_megatron.config.megatron import (
    COMPUTATION_FIELDS,
    EXECUTION_FIELDS,
    OPTIMIZER_FIELDS,
    REQUIRES,
    TOP_K_MOE_FIELDS,
)
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, own_batches, small_run

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "recompute_granularity": FULL,
    "recompute_method": FULL,
    "recompute_num_layers": FULL,
    "recompute_modules": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "distribute_saved_activations": {**FULL, "distribute_saved_activations": True},
    "batch_p2p_comm": {"batch_p2p_comm": False},
    "softmax_scale": {"softmax_scale": 0.1},
    "rotary_interleaved": {"rotary_interleaved": True},
    "no_rope_freq": {"no_rope_freq": [1, 0]},
    "moe_router_num_groups": GROUPS,
    "moe_router_group_topk": GROUPS,
    "moe_router_topk_scaling_factor": {"moe_router_topk_scaling_factor": 2.5},
    "moe_router_score_function": {"moe_router_score_function": "sigmoid"},
    "moe_z_loss_coeff": {"moe_z_loss_coeff": 0.1},
    "activation_func_clamp_value": {"activation_func_clamp_value": 0.01},
    "glu_linear_offset": {"glu_linear_offset": 1.0},
    "decoupled_weight_decay": {"decoupled_weight_decay": False},
    "decoupled_lr": {"decoupled_lr": 0.1},
    "decoupled_min_lr": {"decoupled_lr": 0.1, "decoupled_min_lr": 0.05},
}
"""A value of each field, with the fields that it requires."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Fields of megatron-core's configs that were read after their construction; losses and gradient norms."""

    reads: set[str]
    figures: list[float]
    lr: float


def run_of(field: str | None, *, packed: bool = False, top_k: bool = False) -> RunConfig:
    model: dict[str, Any] = {"ffn": "top_k_moe", "ffn_activation": "swiglu", "routing_mode": None} if top_k else {}
    run = small_run(LAYOUTS["pp2"], num_layers=2, **model)
    values = SETTINGS[field] if field else {}
    section = "optimizer" if field in OPTIMIZER_FIELDS else "model"
    run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), megatron=values)})
    # The rate falls from the first step on, so that its minimum counts.
    optimizer = dataclasses.replace(run.optimizer, warmup_steps=0)
    return dataclasses.replace(run, optimizer=optimizer, data=DataConfig(reset_at_eod=packed))


@contextmanager
def reads_of(kind: type, into: set[str]) -> Iterator[None]:
    """Collect the fields of a config that are read by others than its own methods and copies."""
    names = {field.name for field in dataclasses.fields(kind)}

    def reading(self: Any, name: str) -> Any:
        if name in names:
            frame, own = sys._getframe(1), False
            while frame is not None and not own:
                own = frame.f_locals.get("self") is self or frame.f_globals.get("__name__") in ("copy", "dataclasses")
                own = own or frame.f_code.co_name == "__eq__"
                frame = frame.f_back  # type: ignore[assignment]
            if not own:
                into.add(name)
        return object.__getattribute__(self, name)

    kind.__getattribute__ = reading  # type: ignore[method-assign]
    try:
        yield
    finally:
        del kind.__getattribute__


def train_each(runs: list[RunConfig]) -> list[Outcome]:
    from steel_megatron.parallel.topology import initialize

    topology = initialize(runs[0].parallel)
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from steel_megatron.train.engine import Engine

    outcomes = []
    for run in runs:
        reads: set[str] = set()
        with reads_of(TransformerConfig, reads), reads_of(OptimizerConfig, reads):
            engine = Engine(run, topology)
            steps = [engine.step(own_batches(run, step, topology)) for step in (1, 2)]
            last = engine.accumulate_gradients(own_batches(run, 3, topology))
        figures = [figure for step in steps for figure in (step.loss, step.grad_norm)]
        outcomes.append(Outcome(reads, [*figures, next(iter(last.values())).mean], steps[0].lr))
    return outcomes


def test_every_field_has_a_value_here() -> None:
    assert tuple(SETTINGS) == EXECUTION_FIELDS + COMPUTATION_FIELDS + TOP_K_MOE_FIELDS + OPTIMIZER_FIELDS
    for field, (other, value) in REQUIRES.items():
        assert SETTINGS[field][other] == value or value is None


def test_fields_are_read_and_train() -> None:
    """On two pipeline stages; fields of how a model is computed change nothing, all others change the loss."""
    runs = {
        "plain": run_of(None),
        "plain top_k": run_of(None, top_k=True),
        **{field: run_of(field, top_k=field in TOP_K_MOE_FIELDS) for field in SETTINGS},
        # Layers that are computed again in the backward pass see the documents of their own micro batch.
        "packed": run_of(None, packed=True),
        "packed, recomputed": run_of("recompute_granularity", packed=True),
        "packed, attention recomputed": run_of("recompute_modules", packed=True),
    }
    by_rank = run_distributed(train_each, 2, list(runs.values()))
    outcomes = dict(zip(runs, by_rank[0], strict=True))
    plain = {name: pytest.approx(outcomes[name].figures, rel=1e-6) for name in ("plain", "plain top_k", "packed")}
    for field in SETTINGS:
        found = outcomes[field]
        assert field in found.reads, f"nothing reads {field}"
        unchanged = found.figures == plain["plain top_k" if field in TOP_K_MOE_FIELDS else "plain"]
        assert unchanged == (field in EXECUTION_FIELDS), field
        assert found.lr == outcomes["plain"].lr, field
    assert outcomes["decoupled_lr"].figures != pytest.approx(outcomes["decoupled_min_lr"].figures, rel=1e-6)
    for name in ("packed, recomputed", "packed, attention recomputed"):
        assert outcomes[name].figures == plain["packed"], name
    for field in ("qk_layernorm", "window_size", "layernorm_zero_centered_gamma"):
        assert field not in outcomes["plain"].reads | outcomes["plain top_k"].reads
