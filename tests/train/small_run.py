"""A small run that every parallel test trains, in one process or in several."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from steel_megatron.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

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


def train(run: RunConfig, first: int = 1, last: int | None = None, save: bool = False, load: bool = False) -> list[Any]:
    """Train steps ``first`` to ``last``.

    Returns:
        the (loss, gradient norm) of each step, and at the end the (loss, labels) of an evaluation.
    """
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train import checkpoint
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
        results.append((result.loss, result.grad_norm))
    results.append(tuple(minimised(engine.evaluate(own_batches(run, 0, topology)))))
    if save:
        checkpoint.save(engine, engine.step_number * run.training.global_batch_size)
    return results
