"""Training speed of every variant, measured apart from the runs: one after another, in turns, with one thread."""

from __future__ import annotations

import json
import statistics
import time

import job
import torch
from variants import Variant

from steel_megatron.config import ParallelConfig
from steel_megatron.errors import DataError
from steel_megatron.files import write_atomically
from steel_megatron.platform import prepare


def measure_speed(plan: job.Plan, variants: list[Variant], rounds: int) -> None:
    """Time one optimizer step of each variant, ``rounds`` times around; the median goes to OUTPUT/speed.json."""
    prepare()
    torch.set_num_threads(1)
    from steel_megatron.data.ledger.session import LedgerSession
    from steel_megatron.parallel import agreement
    from steel_megatron.parallel.topology import initialize, shutdown
    from steel_megatron.train.batches import Batches
    from steel_megatron.train.engine import Engine

    topology = initialize(ParallelConfig())
    runs = [job.run_config(plan, variant.model, 1, plan.output / "work/speed") for variant in variants]
    session = LedgerSession(runs[0], agreement)
    session.start()
    batch = Batches(runs[0], topology, session).training(0)
    engines = [Engine(run, topology) for run in runs]
    seconds: list[list[float]] = [[] for _ in engines]
    for turn in range(rounds + 1):
        for engine, measured in zip(engines, seconds, strict=True):
            started = time.perf_counter()
            engine.step(batch)
            if turn:  # the first is to warm up
                measured.append(time.perf_counter() - started)
    shutdown()
    tokens = plan.batch * runs[0].model.sequence_length
    found = {
        variant.name: tokens / statistics.median(measured) for variant, measured in zip(variants, seconds, strict=True)
    }
    write_atomically(plan.output / "speed.json", json.dumps(found, indent=1).encode(), DataError)
