"""Training steps for benchmarks/gpu_check.py: each implementation that is here, held to the first one, and timed.

Alone, or under torchrun on all GPUs of a machine.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steel_megatron.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from steel_megatron.parallel.topology import Topology
from steel_megatron.platform import probe

STEEL = ModelConfig(  # examples/steel_1b, in the causal mode
    num_layers=18,
    hidden_size=1792,
    num_attention_heads=32,
    ffn_hidden_size=448,
    num_experts=6,
    routing_mode="block_causal",
    slot_input="normalized",
)
TINY = dataclasses.replace(
    STEEL, num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=64, vocab_size=500, sequence_length=128
)
OVERLAP = ("overlap_grad_reduce", "overlap_param_gather")
"""Options of ``parallel`` for what is sent while something is computed; they matter where several GPUs train."""
STEPS = 4
"""Of each run; the first one does not count for its time."""
LOSS_LIMIT = 2e-2
"""Relative difference of losses in bfloat16 that two implementations may have after :data:`STEPS` steps."""


def runs(topology: Topology, tiny: bool) -> Iterator[tuple[str, RunConfig]]:
    """The runs to compare: the implementations that are here, with and without overlap where there are several GPUs."""
    size = 2 if tiny else 4
    run = RunConfig(
        model=TINY if tiny else STEEL,
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=1),
        training=TrainingConfig(
            precision="bfloat16",
            train_steps=STEPS,
            micro_batch_size=size,
            global_batch_size=2 * size * topology.data_parallel_size,
        ),
    )
    names = ["local"] + (["transformer_engine"] if probe().transformer_engine is not None else [])
    settings = [name for name in OVERLAP if name in ParallelConfig.__dataclass_fields__]
    overlaps = [dict.fromkeys(settings, on) for on in (True, False)]
    for name in names:
        model = dataclasses.replace(run.model, implementation=name)
        for overlap in overlaps if settings and topology.data_parallel_size > 1 else [{}]:
            title = f"{name}, overlap {'on' if any(overlap.values()) else 'off'}" if overlap else name
            parallel = dataclasses.replace(run.parallel, **overlap)
            yield title, dataclasses.replace(run, model=model, parallel=parallel)


def batches(run: RunConfig, topology: Topology, step: int) -> list[Any]:
    """This process's micro batches of random tokens; the same in each run."""
    from steel_megatron.train.objective import Batch

    generator = torch.Generator().manual_seed(1000 * step + topology.data_parallel_rank)
    shape = (run.training.micro_batch_size, run.model.sequence_length + 1)
    found = []
    for _ in range(run.num_micro_batches(topology.launch.world_size)):
        tokens = torch.randint(0, run.model.vocab_size, shape, generator=generator)
        mask = torch.ones(shape[0], shape[1] - 1)
        found.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask).to(topology.device))
    return found


def measure(run: RunConfig, topology: Topology) -> dict[str, Any]:
    """Train a few steps.

    Returns:
        ``losses`` of the steps; ``ms`` of a step (median), ``tokens_per_second`` of all processes, ``mfu`` (None where
        the device's peak is not known); ``held_bytes`` that a plan counts, and ``peak_bytes`` of the device's memory
        (None on a CPU).
    """
    from steel_megatron.model.flops import training_flops_per_token
    from steel_megatron.train.checkpoint_plan import memory_of
    from steel_megatron.train.engine import Engine

    on_gpu = topology.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(run, topology)
    losses, spent = [], []
    for step in range(1, STEPS + 1):
        own = batches(run, topology, step)
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(engine.step(own).loss)
        if on_gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    seconds, peak = statistics.median(spent[1:]), probe().peak_flops
    tokens = run.training.global_batch_size * run.model.sequence_length / seconds
    flops = tokens / topology.launch.world_size * training_flops_per_token(run.model)
    return {
        "losses": losses,
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens,
        "mfu": flops / peak if peak else None,
        "held_bytes": memory_of(engine, topology.launch.rank).total,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def wrong_losses(losses: list[float], first: list[float]) -> str | None:
    """What is wrong with a run's losses next to those of the first one."""
    if not all(loss == loss and abs(loss) != float("inf") for loss in losses):
        return f"a loss is not finite: {losses}"
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
    return f"losses differ by {worst:.1e} (allowed {LOSS_LIMIT:.0e})" if worst > LOSS_LIMIT else None


def checkpoints_agree(topology: Topology, names: list[str]) -> str | None:
    """Save with each implementation, load with the next one, save again: what differs between the two checkpoints."""
    _, run = next(runs(topology, tiny=True))
    made = [tempfile.mkdtemp(prefix="gpu_check_") if topology.is_rank0 else ""]
    dist.broadcast_object_list(made, src=0)
    try:
        return _save_and_load(topology, names, run, Path(made[0]))
    finally:
        dist.barrier()
        shutil.rmtree(made[0], ignore_errors=True)


def _save_and_load(topology: Topology, names: list[str], run: RunConfig, folder: Path) -> str | None:
    from steel_megatron.train import checkpoint, checkpoint_save
    from steel_megatron.train.checkpoint_compare import compare
    from steel_megatron.train.engine import Engine

    saved: list[Path] = []
    for number, name in enumerate([*names, names[0]]):
        own = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, implementation=name),
            checkpoint=CheckpointConfig(directory=str(folder / str(number))),
        )
        engine = Engine(own, topology)
        if number == 0:
            engine.step(batches(own, topology, 1))
        else:
            checkpoint.load(engine, checkpoint.read_info(saved[-1]))
        saved.append(checkpoint_save.save(engine, run.training.global_batch_size))
    for name, path in zip([*names[1:], names[0]], saved[1:], strict=True):
        differences = compare(saved[0], path).differences
        if differences:
            return f"{name} changed {differences[0].name} of a checkpoint that {names[0]} saved"
    return None
