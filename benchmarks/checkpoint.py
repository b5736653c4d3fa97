"""Saving and loading a run's state, against torch.distributed.checkpoint with fsync.

    python benchmarks/checkpoint.py [--gb 1.5] [--rounds 5] [--folder .]

Both write the same tensors (weights and the two means of Adam, in float32) and sync them to disk; ours also hashes
every file, checks that every tensor is finite, and on loading compares the hashes. Each way runs in turn, so that
whatever else the machine does hits all, and a ratio is the median of the rounds' ratios. Loads read what was just
written, which mostly is in the memory of the machine. The seconds of processor time say more than the others where
something else runs on the machine.

A save is also begun before a training step. ``pause`` is how long the begin takes, in which training stands still.
``wait`` is how long the step's update then waits for the copy, after forward and backward; pause and wait together are
the ``stall``. A step that shares the machine with a save computes more slowly as well: its time is printed next to
that of the same step alone. Neither updates anything, so that all rounds save the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

import torch.distributed.checkpoint as dcp  # noqa: E402

from steel_megatron.config import (  # noqa: E402
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from steel_megatron.parallel.topology import initialize, shutdown  # noqa: E402

HIDDEN = 768
VOCABULARY = 8_000
Seconds = dict[str, list[tuple[float, float]]]
"""Wall-clock time and processor time of each round."""


def run_of(gb: float, directory: Path) -> RunConfig:
    """A dense model with about ``gb`` gigabytes of weights and means."""
    per_layer = 12 * HIDDEN * HIDDEN
    layers = max(1, round((gb * 1e9 / 12 - 2 * VOCABULARY * HIDDEN) / per_layer))
    return RunConfig(
        model=ModelConfig(
            num_layers=layers,
            hidden_size=HIDDEN,
            num_attention_heads=12,
            num_query_groups=12,
            ffn="dense",
            ffn_hidden_size=HIDDEN * 8 // 3,
            num_experts=1,
            vocab_size=VOCABULARY,
            sequence_length=128,
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1),
        training=TrainingConfig(train_steps=10, global_batch_size=1, micro_batch_size=1),
        checkpoint=CheckpointConfig(directory=str(directory)),
    )


def timed(seconds: Seconds, name: str, way: Callable[[], object]) -> None:
    """Note how long something takes."""
    started, processor = time.perf_counter(), time.process_time()
    way()
    seconds.setdefault(name, []).append((time.perf_counter() - started, time.process_time() - processor))


def main() -> None:
    """Print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5, help="gigabytes of weights and means")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=given.folder))
    try:
        measure(run_of(given.gb, folder), folder, given.rounds)
    finally:
        shutil.rmtree(folder)
        shutdown()


def measure(run: RunConfig, folder: Path, rounds: int) -> None:
    """Save and load in turn."""
    topology = initialize(run.parallel)
    from steel_megatron.train import checkpoint
    from steel_megatron.train.checkpoint_save import Saver
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.objective import Batch

    engine = Engine(run, topology)
    sharded = checkpoint.sharded_engine(engine)
    tensors = {one.key + str(one.global_offset): one.data.detach() for one in sharded["model"].values()}
    tensors |= {one.key + str(one.global_offset): one.data for one in sharded["optimizer"].values()}
    for tensor in tensors.values():
        tensor.normal_()
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{size / 1e9:.2f} GB in {len(tensors)} tensors; {os.cpu_count()} cores; medians of {rounds} rounds")
    kept = {name: tensor.clone() for name, tensor in tensors.items()}  # dcp loads into these, with memory of their own
    saver, ours, theirs = Saver(run), checkpoint.path_of(run, 0), folder / "dcp"
    seconds: Seconds = {}

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1, run.model.sequence_length + 1), generator=generator)
    batch = [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(1, tokens.size(1) - 1), None)]

    def save_ours() -> None:
        saver.begin(engine, 0)
        saver.finish()

    def save_ours_in_a_step() -> None:
        timed(seconds, "step alone", lambda: engine.accumulate_gradients(batch))
        timed(seconds, "pause", lambda: saver.begin(engine, 0))
        timed(seconds, "step during a save", lambda: engine.accumulate_gradients(batch))
        timed(seconds, "wait", engine.before_update)
        saver.finish()
        seconds.setdefault("stall", []).append(
            tuple(sum(seconds[part][-1][column] for part in ("pause", "wait")) for column in (0, 1))
        )

    def save_theirs(threads: int) -> None:
        dcp.save(kept, storage_writer=dcp.FileSystemWriter(theirs, sync_files=True, thread_count=threads), no_dist=True)

    def load_ours() -> None:
        info = checkpoint.newest(run.checkpoints_dir)
        assert info is not None
        checkpoint.load(engine, info)

    for _ in range(rounds + 1):
        for name, path, way in (
            ("save, ours", ours, save_ours),
            ("save, dcp", theirs, lambda: save_theirs(1)),
            ("save, dcp with 2 threads", theirs, lambda: save_theirs(2)),
        ):
            shutil.rmtree(path, ignore_errors=True)
            os.sync()
            timed(seconds, name, way)
        shutil.rmtree(ours)
        save_ours_in_a_step()
        for tensor in tensors.values():
            tensor.zero_()
        timed(seconds, "load, ours", load_ours)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
        timed(seconds, "load, dcp", lambda: dcp.load(kept, storage_reader=dcp.FileSystemReader(theirs), no_dist=True))
    report(seconds, size)


def report(seconds: Seconds, size: int) -> None:
    """The first round is to warm up."""
    seconds = {name: values[1:] for name, values in seconds.items()}

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for (a, _), (b, _) in zip(seconds[over], seconds[under], strict=True))

    for name, values in seconds.items():
        wall, processor = ([value[column] for value in values] for column in (0, 1))
        middle = statistics.median(wall)
        print(
            f"{name:26} {middle:7.3f} s ({min(wall):.3f} to {max(wall):.3f})  {size / middle / 1e9:5.2f} GB/s  "
            f"{statistics.median(processor):7.3f} s of processor time"
        )
    print(f"throughput of a save       {ratio('save, dcp', 'save, ours'):.2f} of dcp's (goal: at least 0.9)")
    print(f"  against two threads      {ratio('save, dcp with 2 threads', 'save, ours'):.2f}")
    print(f"pause of training          {ratio('pause', 'save, ours'):.1%} of a save (goal: at most 5%)")
    print(f"stall, with the wait       {ratio('stall', 'save, ours'):.1%} of a save")
    print(f"a step during a save takes {ratio('step during a save', 'step alone'):.2f} times as long as alone")
    print(f"load with verification     {ratio('load, ours', 'load, dcp'):.2f} times dcp's load (goal: at most 1.3)")


if __name__ == "__main__":
    main()
