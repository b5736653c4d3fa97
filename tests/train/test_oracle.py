"""The engine and the loop do what a plain trainer does: losses, norms, rates and every weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from steel_megatron.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from tests.distributed import run_distributed
from tests.hf.test_convert import assemble
from tests.train.engine_runs import Case, Record, followed, gradients_twice
from tests.train.oracle import DECAYED, Oracle, Sample, Weights, movement_errors

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=8,
    num_experts=4,
    slots_per_expert=2,
    routing_mode="block_causal",
    block_length=4,
    routing_scale_init=3.0,
    shared_expert_intermediate_size=6,
    vocab_size=50,
    make_vocab_size_divisible_by=32,  # 14 rows of padding, of which the second of two processes has all
    sequence_length=12,
    rotary_base=100,
    norm_epsilon=1e-2,
    init_method_std=0.3,
    expert_init_method_std=0.4,
)
# Adam divides a gradient by its own size. An epsilon of rounding's size would blow up the rounding of gradients that
# are nearly zero; this one is far above it and far below most gradients, so that it still has to be right.
COURSE = OptimizerConfig(
    lr=0.02, min_lr=0.004, warmup_steps=3, weight_decay=0.2, beta1=0.8, beta2=0.95, epsilon=1e-3, clip_grad=2.0
)


def make_case(
    steps: int = 2,
    *,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008
    packed: bool = False,
    precision: Any = "float32",
    optimizer: dict[str, Any] | None = None,
    seed: int = 1234,
    **model: Any,
) -> Case:
    run = RunConfig(
        model=dataclasses.replace(MODEL, **model),
        parallel=parallel,
        data=DataConfig(reset_at_eod=packed),
        optimizer=dataclasses.replace(COURSE, **(optimizer or {})),
        training=TrainingConfig(
            train_steps=steps, global_batch_size=8, micro_batch_size=2, precision=precision, seed=seed
        ),
    )
    batches = [samples(number, run) for number in range(1, steps + 1)]
    return Case(run, batches, tuple({1, 2, steps}), samples(0, run))


def samples(seed: int, run: RunConfig) -> list[Sample]:
    """A global batch whose rows count from all to none of their labels; one micro batch counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    length = run.model.sequence_length
    shares = torch.tensor([1.0, 0.3, 0.9, 0.1, 0.0, 0.0, 0.7, 0.5]).roll(2 * seed)
    rows = []
    for share in shares.tolist():
        tokens = torch.randint(run.model.vocab_size, (length + 1,), generator=generator)
        counts = torch.rand(length, generator=generator) < share
        begins: tuple[int, ...] = ()
        if run.data.reset_at_eod:
            begins = tuple(sorted((torch.randperm(length, generator=generator)[: 1 + len(rows) % 3] + 1).tolist()))
            counts[[begin - 1 for begin in begins]] = False
        rows.append(Sample(tokens, counts, begins))
    return rows


def of_layout(processes: int, **parallel: int) -> tuple[int, dict[str, Case]]:
    layout = ParallelConfig(**parallel)  # type: ignore[arg-type]
    cases = {
        "block_causal": make_case(3, parallel=layout),
        "sequence": make_case(parallel=layout, routing_mode="sequence"),
        "token": make_case(parallel=layout, routing_mode="token"),
        "merged, one segment": make_case(parallel=layout, routing_mode="merged", block_length=MODEL.sequence_length),
        "packed merged": make_case(parallel=layout, packed=True, routing_mode="merged"),
    }
    return processes, cases


LAYOUTS = {
    "dp2": of_layout(2),
    "tp2 ep2 dp2": of_layout(4, tensor_model_parallel_size=2, expert_model_parallel_size=2),
    "pp2 dp2": of_layout(4, pipeline_model_parallel_size=2),
}
ALONE = {
    "whole course": make_case(20),
    "sequence, no warm-up, no clipping": make_case(
        routing_mode="sequence", optimizer={"warmup_steps": 0, "clip_grad": 0.0, "weight_decay": 1.0}
    ),
    "token, decay ends before the run": make_case(
        6, routing_mode="token", optimizer={"warmup_steps": 2, "decay_steps": 4}
    ),
    "merged, decay ends after the run": make_case(3, routing_mode="merged", optimizer={"decay_steps": 40}),
    "dense, decay ends within the warm-up": make_case(
        4,
        ffn="dense",
        routing_mode=None,
        shared_expert_intermediate_size=0,
        optimizer={"warmup_steps": 2, "decay_steps": 1},
    ),
    "swiglu, warm-up longer than the run": make_case(
        slot_input="normalized", ffn_activation="swiglu", optimizer={"warmup_steps": 5}
    ),
    "normalized, no course at all": make_case(
        slot_input="normalized", optimizer={"warmup_steps": 0, "decay_steps": 0, "epsilon": 1e-6}
    ),
    "packed block_causal": make_case(packed=True),
    "packed sequence": make_case(packed=True, routing_mode="sequence"),
    "packed merged": make_case(packed=True, routing_mode="merged"),
    "another seed": dataclasses.replace(make_case(1, seed=4321), batches=[], kept=()),
    "experts alike": dataclasses.replace(make_case(1, identical_expert_init=True), batches=[], kept=()),
    "bfloat16": make_case(20, precision="bfloat16", optimizer={"lr": 0.005}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers: handing them out to threads takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def alone() -> dict[str, list[Record]]:
    return followed(1, ALONE)


def whole(records: list[Record], case: Case, step: int | None = None) -> Weights:
    parts = [record.initial if step is None else record.weights[step] for record in records]
    return assemble(parts, case.run.model)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Relative errors that are rounding.

    Attributes:
        loss: of losses.
        norm: of gradient norms.
        movement: of each tensor, relative to how far it should have moved.
        rounding: of each tensor beside, because of the type it is stored in.
    """

    loss: float
    norm: float
    movement: float
    rounding: float = 0.0


# The oracle in float32 is as far from itself in float64 as the engine is: at most 4e-7, 4e-5 and 4e-4 (the scale, one
# number near 3 that moves by 7e-3 a step).
FLOAT32 = Bounds(2e-6, 2e-4, 1e-3)
# Measured: 2e-3, 0.09 at a step after which the gradient is small, and 0.17 for the 8 numbers of a bias after one step.
BFLOAT16 = Bounds(1e-2, 0.2, 0.3, rounding=2**-9)


def hold_to_oracle(records: list[Record], case: Case, bounds: Bounds = FLOAT32) -> None:
    """Compare what all processes saw with the oracle."""
    before = whole(records, case)
    oracle = Oracle(case.run, before)
    validation = [oracle.evaluate(case.validation)]
    for number, batch in enumerate(case.batches, start=1):
        theirs = oracle.step(batch)
        for ours in (record.steps[number - 1] for record in records):
            assert ours.loss == pytest.approx(theirs.loss, rel=bounds.loss), number
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=bounds.norm), number
            assert ours.lr == pytest.approx(theirs.lr, rel=1e-12), number
            assert ours.tokens == theirs.tokens, number
        if number in case.kept:
            errors = movement_errors(whole(records, case, number), oracle.weights(), before, bounds.rounding)
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] < bounds.movement, f"step {number}: {worst}"
    validation.append(oracle.evaluate(case.validation))
    for record in records:
        for ours, theirs in zip(record.validation, validation, strict=True):
            assert ours == (pytest.approx(theirs[0], rel=bounds.loss), theirs[1])


@pytest.mark.parametrize("name", [name for name in ALONE if ALONE[name].batches])
def test_one_process(name: str) -> None:
    if name == "bfloat16":
        hold_to_oracle(alone()[name], ALONE[name], BFLOAT16)
    else:
        hold_to_oracle(alone()[name], ALONE[name])


def test_the_courses_clip_some_steps_and_not_others() -> None:
    norms = [step.grad_norm for step in alone()["whole course"][0].steps]
    assert min(norms) < 0.9 * COURSE.clip_grad and max(norms) > 1.1 * COURSE.clip_grad


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Micro batches and data-parallel processes with different numbers of labels, down to none."""
    processes, cases = LAYOUTS[layout]
    for name, records in followed(processes, cases).items():
        hold_to_oracle(records, cases[name])


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """In standard deviations of what independent values would give."""
    return abs(float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1])) * math.sqrt(one.numel())


def test_initial_weights_are_drawn_independently() -> None:
    """Every matrix of every layer and expert has its own values, and other ones under another seed."""
    one, other = (whole(alone()[name], ALONE[name]) for name in ("whole course", "another seed"))
    again = whole(alone()["packed merged"], ALONE["packed merged"])
    assert all(torch.equal(again[name], values) for name, values in one.items())
    matrices = {name: values for name, values in one.items() if name.endswith(DECAYED)}
    for name, values in matrices.items():
        std = MODEL.expert_init_method_std if ".mlp.experts." in name else MODEL.init_method_std
        spread = 5 / math.sqrt(2 * values.numel())  # five standard errors of a standard deviation
        assert std is not None and float(values.std()) == pytest.approx(std, rel=spread), name
        assert correlation(values, other[name]) < 5, name
        for same_shape, others in matrices.items():
            if same_shape > name and others.shape == values.shape:
                assert correlation(values, others) < 5, (name, same_shape)
    for name in one.keys() - matrices.keys():
        constant = 0.0 if name.endswith("bias") else MODEL.routing_scale_init if name.endswith("scale") else 1.0
        assert (one[name] == constant).all(), name


def test_experts_that_start_alike_differ_between_layers() -> None:
    weights = whole(alone()["experts alike"], ALONE["experts alike"])
    matrix = "model.layers.{}.mlp.experts.{}.{}.weight"
    for name in ("up_proj", "gate_up_proj", "down_proj", "gate_down_proj"):
        first, second = ([weights[matrix.format(layer, expert, name)] for expert in range(4)] for layer in (0, 1))
        assert all(torch.equal(expert, first[0]) for expert in first)
        assert all(torch.equal(expert, second[0]) for expert in second)
        assert correlation(first[0], second[0]) < 5


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """The mean of seven equal gradients is that gradient; in bfloat16 their sum would be rounded on the way."""
    case = ALONE["bfloat16"]
    tokens = [sample.tokens.tolist() for sample in case.batches[0][:2]]
    errors, norm = run_distributed(gradients_twice, 1, case.run, tokens, 7, False)[0]
    assert norm > 0.1
    for name, error in errors.items():
        assert error < 1e-5, name


def test_a_step_after_an_evaluation_is_a_training_step() -> None:
    """megatron-core's router adds its load-balancing loss to gradients only where the model is in training mode."""
    run = make_case(
        1, ffn="top_k_moe", ffn_activation="swiglu", moe_aux_loss_coeff=1.0, shared_expert_intermediate_size=0
    ).run
    tokens = [sample.tokens.tolist() for sample in samples(1, run)[:2]]
    errors, norm = run_distributed(gradients_twice, 1, run, tokens, 1, True)[0]
    assert norm > 0.1
    for name, error in errors.items():
        assert error < 1e-5, name
