"""A small run that every parallel test trains, in one process or in several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steel_megatron.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from tests.hf.launched import gather_gradients

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    num_experts=4,
    slots_per_expert=2,
    routing_mode="block_causal",
    block_length=8,
    shared_expert_intermediate_size=16,
    vocab_size=100,
    sequence_length=24,
    init_method_std=0.1,  # large enough that experts and routing matter to the loss
)
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
    "dp2": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2 ep2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2),
}
PROCESSES = {"tp2": 2, "pp2": 2, "ep2": 2, "dp2": 2, "tp2 pp2": 4, "tp2 ep2": 4}
# Layouts in which processes share the tokens of a sequence.
SHARED_LAYOUTS = {
    "tp2 sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": ParallelConfig(context_parallel_size=2),
    "cp2 ep2": ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
    "cp4": ParallelConfig(context_parallel_size=4),
    "cp2 dp2": ParallelConfig(context_parallel_size=2),
    "cp2 tp2": ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
    "cp2 tp2 sp": ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2 pp2": ParallelConfig(context_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2 sp pp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2),
    "tp2 sp ep2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
    "cp2 tp2 sp ep2": ParallelConfig(
        context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2
    ),
    "cp2 dp2 ep4": ParallelConfig(context_parallel_size=2, expert_model_parallel_size=4),
}
LAYOUTS |= SHARED_LAYOUTS
PROCESSES |= {name: 2 if name in ("tp2 sp", "cp2", "cp2 ep2") else 4 for name in SHARED_LAYOUTS}


def small_run(parallel: ParallelConfig, directory: str = "unused", steps: int = 10, **model: Any) -> RunConfig:
    """The small run under a layout; ``model`` replaces fields of the model."""
    return RunConfig(
        model=dataclasses.replace(MODEL, **model),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2),
        training=TrainingConfig(train_steps=steps, global_batch_size=8, micro_batch_size=2, log_interval=1),
        checkpoint=CheckpointConfig(directory=directory),
    )


def global_batch(run: RunConfig, step: int) -> torch.Tensor:
    """int64 [8, 25] tokens of a step; one sequence in four repeats itself, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    shape = (run.training.global_batch_size, run.model.sequence_length + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, generator=generator)
    tokens[::4] = torch.arange(shape[1]) % 7
    return tokens


def own_batches(run: RunConfig, step: int, topology: Any) -> list[Any]:
    """This process's micro batches of a step; every fifth label of a sequence does not count.

    With ``data.reset_at_eod`` the tokens 3 and 50 are taken for ends of documents.
    """
    from steel_megatron.train.objective import Batch

    def starts(tokens: torch.Tensor) -> torch.Tensor | None:
        if not run.data.reset_at_eod:
            return None
        begins = torch.zeros_like(tokens)
        after_an_end = (tokens[:, :-1] == 3) | (tokens[:, :-1] == 50)
        begins[:, 1:] = torch.where(after_an_end, torch.arange(1, tokens.size(1)), 0)
        return begins.cummax(dim=1).values

    tokens = global_batch(run, step)
    own = tokens.view(-1, topology.data_parallel_size, run.training.micro_batch_size, tokens.size(1))
    mask = (torch.arange(run.model.sequence_length) % 5 != 4).float()
    return [
        Batch(
            micro[:, :-1].contiguous(),
            micro[:, 1:].contiguous(),
            mask.expand(micro.size(0), -1).contiguous(),
            starts(micro[:, :-1]),
        ).part(topology)
        for micro in own[:, topology.data_parallel_rank]
    ]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one process saw of a step: loss, gradient norm, and what each part of the weights that it holds had of it.

    ``parts`` are the sums of the squared gradient, clipped as the update used it, by the weight's name and the part's
    place in it.
    """

    loss: float
    grad_norm: float
    parts: dict[str, float]


def compare(ranks: Sequence[Sequence[Any]], one: Sequence[Any], rel: float = 1e-5) -> None:
    """Steps of all processes of a layout, and those of one process alone: the same, and the gradient of every tensor.

    Args:
        ranks: what :func:`train` gave, by rank; an evaluation at its end is compared as well.
        one: the same of one process.
        rel: relative error that is rounding; of one tensor's gradient ten times that, and a ten thousandth of the
            whole gradient's: terms cancel in the one number of a routing's scale.
    """
    for step, (theirs, *ours) in enumerate(zip(one, *ranks, strict=True), start=1):
        if not isinstance(theirs, Trained):
            assert all(evaluated == pytest.approx(theirs, rel=rel) for evaluated in ours), "evaluation"
            continue
        for rank in ours:
            assert (rank.loss, rank.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=rel), step
        together, expected = norms_of_tensors(ours), norms_of_tensors([theirs])
        assert together.keys() == expected.keys()
        for name, norm in expected.items():
            assert norm > 0, f"step {step}: nothing reaches {name}"
            near = pytest.approx(norm, rel=10 * rel, abs=1e-4 * rel * theirs.grad_norm)
            assert together[name] == near, f"step {step}: the gradient of {name}"


def norms_of_tensors(ranks: Sequence[Trained]) -> dict[str, float]:
    """The gradient's norm of each tensor of each layer; copies on several processes are the same, and count once."""
    parts: dict[str, float] = {}
    for rank in ranks:
        for place, square in rank.parts.items():
            first = parts.setdefault(place, square)
            assert first == pytest.approx(square, rel=1e-6), (place, first, square)
    norms: dict[str, float] = {}
    for place, square in parts.items():
        name = place.split(" at ")[0]
        norms[name] = norms.get(name, 0.0) + square
    return {name: square**0.5 for name, square in norms.items()}


def _gradient_inside(parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a weight that is a parameter, or a part of it; None if it is in another one."""
    start = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    if not 0 <= start < parameter.numel():
        return None
    return parameter.main_grad.flatten()[start : start + weight.numel()]


def gradient_squares(engine: Any) -> dict[str, float]:
    """The sum of the squared gradient of each weight, or part of one, that this process holds."""
    from steel_megatron.model.lora import is_adapter
    from steel_megatron.model.weights import sharded_weights

    for model in engine.models:
        gather_gradients(model)
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    squares = {}
    for sharded in sharded_weights(*engine.chunks).values():
        if engine.run.lora.rank is not None and not is_adapter(sharded.key):
            continue
        layer = sharded.global_offset[: sharded.prepend_axis_num]
        name = f"{sharded.key} of layer {layer[0] + 1}" if layer else sharded.key
        (gradient,) = (found for one in parameters if (found := _gradient_inside(one, sharded.data)) is not None)
        squares[f"{name} at {sharded.global_offset}"] = float(gradient.double().square().sum())
    return squares


def train(run: RunConfig, first: int = 1, last: int | None = None, save: bool = False, load: bool = False) -> list[Any]:
    """Train steps ``first`` to ``last``.

    Returns:
        a :class:`Trained` of each step, and at the end the (loss, labels) of an evaluation.
    """
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.engine import Engine, minimised

    engine = Engine(run, topology)
    if load:
        info = checkpoint.newest(run.checkpoints_dir)
        assert info is not None
        checkpoint.load(engine, info)
        assert engine.step_number == first - 1
    results = []
    for step in range(first, (last or run.training.train_steps) + 1):
        result = engine.step(own_batches(run, step, topology))
        results.append(Trained(result.loss, result.grad_norm, gradient_squares(engine)))
    results.append(tuple(minimised(engine.evaluate(own_batches(run, 0, topology)))))
    if save:
        checkpoint_save.save(engine, engine.step_number * run.training.global_batch_size)
    return results
