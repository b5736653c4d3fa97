"""Objectives, schedules and megatron-core's own settings are chosen by a run, and refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from steel_megatron.errors import ConfigError, SteelError
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, own_batches, small_run

ALONE = ParallelConfig()


def with_halved_loss(run: RunConfig) -> list[dict[str, tuple[float, int]]]:
    """Trains on an objective of the test's own: half the cross entropy, with the whole one reported next to it."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.objective import OBJECTIVES, Batch, NextToken

    class Half(NextToken):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.terms = ("half", "whole")

        def loss(self, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total, count, report = super().loss(batch, logits)
            return total / 2, count, torch.cat((report * torch.tensor([0.5, 1.0]), report))

    OBJECTIVES["half"] = Half
    engine = Engine(run, topology)
    return [
        {name: tuple(term) for name, term in engine.step(own_batches(run, step, topology)).terms.items()}
        for step in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes"), [("alone", 1), ("tp2 pp2", 4)])
def test_an_objective_of_ones_own(layout: str, processes: int) -> None:
    run = small_run(LAYOUTS.get(layout, ALONE), num_layers=2)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, objective="half"))
    for reports in run_distributed(with_halved_loss, processes, run):
        for report in reports:
            (half, items), (whole, same) = report["half"], report["whole"]
            assert half == pytest.approx(whole / 2) and items == same == 8 * 20  # every fifth of 24 labels is masked


def learning_rates(run: RunConfig) -> list[float]:
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine

    engine = Engine(run, topology)
    rates = []
    for _ in range(run.training.train_steps):
        engine.scheduler.step(increment=1)
        rates.append(engine.optimizer.param_groups[0]["lr"])
    return rates


def of_every_run(runs: list[RunConfig]) -> list[list[float]]:
    return [learning_rates(run) for run in runs]


LR, LEAST, WARMUP, DECAY, STEPS = 1e-2, 1e-3, 4, 16, 20


def decayed(step: int) -> float:
    """How much of the decay is over, from 0 to 1."""
    return (step - WARMUP) / (DECAY - WARMUP)


SCHEDULES: dict[str, Callable[[int], float]] = {
    "cosine": lambda step: LEAST + (LR - LEAST) * (1 + math.cos(math.pi * decayed(step))) / 2,
    "linear": lambda step: LEAST + (LR - LEAST) * (1 - decayed(step)),
    "constant": lambda step: LR,
    "inverse_sqrt": lambda step: max(LEAST, LR * math.sqrt(WARMUP / step)),
    # Stable until step 12, then four steps of decay.
    "wsd": lambda step: LEAST + (LR - LEAST) * (1 - math.sqrt(max(0, step - 12) / 4)),
}


def test_schedules_follow_their_formulas() -> None:
    base = small_run(ALONE, steps=STEPS, num_layers=1)
    settings = dataclasses.replace(
        base.optimizer, lr=LR, min_lr=LEAST, warmup_steps=WARMUP, decay_steps=DECAY, wsd_decay_steps=4
    )
    names: list[Any] = list(SCHEDULES)
    runs = [dataclasses.replace(base, optimizer=dataclasses.replace(settings, lr_schedule=name)) for name in names]
    for name, rates in zip(names, run_distributed(of_every_run, 1, runs)[0], strict=True):
        for step, rate in enumerate(rates, start=1):
            expected = LR * step / WARMUP if step <= WARMUP else SCHEDULES[name](step)
            if step > DECAY and name != "constant":
                expected = LEAST
            assert rate == pytest.approx(expected, rel=1e-9), (name, step)


def refusals(runs: list[RunConfig]) -> list[str]:
    from steel_megatron.parallel.topology import initialize

    messages = []
    for run in runs:
        topology = initialize(run.parallel)
        from steel_megatron.train.engine import Engine

        try:
            Engine(run, topology)
            messages.append("no error")
        except SteelError as error:
            messages.append(str(error))
    return messages


REFUSED = {
    "qk_layernorm": True,
    "window_size": [4, 0],
    "layernorm_zero_centered_gamma": True,
    "fp8": "hybrid",
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "cpu_offloading": True,
}
"""Fields that no module of the library reads, or that break a run."""


def test_settings_of_megatron_core() -> None:
    base = small_run(ALONE, num_layers=1)

    def model(**fields: Any) -> RunConfig:
        return dataclasses.replace(base, model=dataclasses.replace(base.model, megatron=fields))

    def optimizer(**fields: Any) -> RunConfig:
        return dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, megatron=fields))

    full: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform"}
    expected = [
        (
            model(no_such_field=1),
            "model.megatron.no_such_field = 1: TransformerConfig has no such field; model.megatron takes "
            "recompute_granularity, ",
        ),
        *(
            (model(**{name: value}), f"model.megatron.{name} = {value!r}: the library's modules do not read this field")
            for name, value in REFUSED.items()
        ),
        (model(hidden_size=3), "model.megatron.hidden_size = 3: the library sets this field itself, to 32; use"),
        (model(moe_z_loss_coeff=0.1), "model.megatron.moe_z_loss_coeff = 0.1: only models with ffn = top_k_moe"),
        (model(recompute_num_layers="one"), "model.megatron.recompute_num_layers = 'one'; it must be of type int"),
        (
            model(recompute_num_layers=1),
            "model.megatron.recompute_num_layers = 1 has no effect without model.megatron.recompute_granularity = full",
        ),
        (
            model(recompute_granularity="selective", recompute_modules=["layernorm"]),
            "model.megatron.recompute_modules has 'layernorm'; with ffn = soft_moe it takes core_attn, mlp",
        ),
        (
            model(recompute_granularity="full", recompute_method=None),
            "megatron-core refuses model.megatron with recompute_granularity = 'full', recompute_method = None: ",
        ),
        (model(no_rope_freq=[1, 0]), "megatron-core refuses model.megatron with no_rope_freq = [1, 0]: "),
        (model(softmax_scale=1, **full, recompute_num_layers=1), "no error"),
        (optimizer(lr=1.0), "optimizer.megatron.lr = 1.0: the library sets this field itself"),
        (optimizer(fp16=True), "optimizer.megatron.fp16 = True: the library sets this field itself, to False; use its"),
        (optimizer(hysteresis=1), "optimizer.megatron.hysteresis = 1: only runs with training.precision = float16"),
        (optimizer(decoupled_weight_decay="x"), "optimizer.megatron.decoupled_weight_decay = 'x'; it must be of type"),
        (optimizer(decoupled_min_lr=0.1), "optimizer.megatron.decoupled_min_lr = 0.1 has no effect without optimizer"),
        (
            dataclasses.replace(base, training=dataclasses.replace(base.training, objective="nothing")),
            "training.objective is 'nothing'; it must be one of next_token",
        ),
    ]
    runs = [run for run, _ in expected]
    for (_, beginning), message in zip(expected, run_distributed(refusals, 1, runs)[0], strict=True):
        assert message.startswith(beginning), message


@pytest.mark.slow
def test_settings_of_the_optimizer_take_effect() -> None:
    """Weight decay in the gradient makes it another optimizer of torch's."""
    base = small_run(ALONE, num_layers=1)
    coupled = dataclasses.replace(
        base, optimizer=dataclasses.replace(base.optimizer, megatron={"decoupled_weight_decay": False})
    )
    plain, other = run_distributed(optimizer_types, 1, [base, coupled])[0]
    assert (plain, other) == ("AdamW", "Adam")


def optimizer_types(runs: list[RunConfig]) -> list[str]:
    from steel_megatron.parallel.topology import initialize

    names = []
    for run in runs:
        topology = initialize(run.parallel)
        from steel_megatron.train.engine import Engine

        optimizer: Any = Engine(run, topology).optimizer
        names.append(type(optimizer.chained_optimizers[0].optimizer).__name__)
    return names


@pytest.mark.parametrize(
    ("validation", "message"),
    [({"z/h": ["a"]}, "names a set 'z/h'; use letters"), ({"zh": []}, r"validation\.zh is empty")],
)
def test_names_of_validation_sets(validation: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(validation=validation)


def test_a_decay_that_does_not_fit() -> None:
    base = small_run(ALONE, steps=10)
    settings = dataclasses.replace(base.optimizer, lr_schedule="wsd", wsd_decay_steps=9)
    with pytest.raises(ConfigError, match=r"warmup_steps = 2 and wsd_decay_steps = 9 are more than the 10 steps"):
        dataclasses.replace(base, optimizer=settings)


@pytest.mark.parametrize(("name", "told"), [("dpo", "; set dpo.label_smoothing, of pairs"), ("sft", None)])
def test_label_smoothing_that_would_change_nothing_is_refused(name: str, told: str | None) -> None:
    from steel_megatron.train.objective import OBJECTIVES

    run = small_run(ALONE)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, objective=name, label_smoothing=0.1))
    topology: Any = SimpleNamespace(groups=SimpleNamespace(tp=None, cp=None))
    stage: Any = SimpleNamespace(documents=None, labels=None)
    if told is None:
        assert OBJECTIVES[name].build(run, topology, stage).label_smoothing == 0.1
        return
    with pytest.raises(ConfigError, match=f"label_smoothing is 0.1, but the objective {name} computes .*{told}"):
        OBJECTIVES[name].build(run, topology, stage)
