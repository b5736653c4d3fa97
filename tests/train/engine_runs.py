"""What the engine does in launched processes, to be held to :mod:`tests.train.oracle`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steel_megatron.config import ParallelConfig, RunConfig
from tests.distributed import run_distributed
from tests.hf.launched import Pieces, pieces
from tests.train.oracle import Sample, Step


@dataclass(frozen=True)
class Case:
    """A run of the engine.

    Attributes:
        run: its settings.
        batches: the global batch of each step.
        kept: steps after which the weights are kept.
        validation: evaluated before the first step and after the last.
    """

    run: RunConfig
    batches: list[list[Sample]]
    kept: tuple[int, ...]
    validation: list[Sample] = field(default_factory=list)


@dataclass
class Record:
    """What one process saw of a case."""

    initial: Pieces
    steps: list[Step] = field(default_factory=list)
    weights: dict[int, Pieces] = field(default_factory=dict)
    validation: list[tuple[float, int]] = field(default_factory=list)


def own_batches(samples: Sequence[Sample], run: RunConfig, topology: Any) -> list[Any]:
    """This process's micro batches of a global batch."""
    from steel_megatron.train.objective import Batch

    size = run.training.micro_batch_size
    together = size * topology.data_parallel_size
    batches = []
    for first in range(size * topology.data_parallel_rank, len(samples), together):
        rows = samples[first : first + size]
        tokens = torch.stack([row.tokens for row in rows])
        starts = torch.zeros_like(tokens)
        for row, sample in enumerate(rows):
            starts[row, list(sample.begins)] = torch.tensor(sample.begins, dtype=torch.int64)
        batches.append(
            Batch(
                tokens[:, :-1].contiguous(),
                tokens[:, 1:].contiguous(),
                torch.stack([row.counts for row in rows]).float(),
                starts.cummax(1).values[:, :-1].contiguous() if run.data.reset_at_eod else None,
            )
        )
    return batches


def weights_of(engine: Any) -> Pieces:
    return pieces(engine.chunks, lambda weight: weight.detach().float().clone())


def followed(processes: int, cases: dict[str, Case]) -> dict[str, list[Record]]:
    """What each process saw of each case; all are of one layout."""
    # Pickled here: multiprocessing would send every tensor as a file of its own.
    by_rank = run_distributed(_follow, processes, pickle.dumps(cases))
    return {name: [records[name] for records in by_rank] for name in cases}


def _follow(pickled: bytes) -> dict[str, Record]:
    from steel_megatron.parallel.topology import initialize

    cases: dict[str, Case] = pickle.loads(pickled)
    topology = initialize(next(iter(cases.values())).run.parallel)
    from steel_megatron.train.engine import Engine, minimised

    records = {}
    for name, case in cases.items():
        engine = Engine(case.run, topology)
        record = records[name] = Record(weights_of(engine))

        def evaluate(engine: Engine = engine, case: Case = case, record: Record = record) -> None:
            if case.validation:
                terms = engine.evaluate(own_batches(case.validation, case.run, topology))
                record.validation.append(tuple(minimised(terms)))

        evaluate()
        for number, samples in enumerate(case.batches, start=1):
            done = engine.step(own_batches(samples, case.run, topology))
            assert done.step == number
            record.steps.append(Step(done.loss, done.grad_norm, done.lr, done.tokens))
            if number in case.kept:
                record.weights[number] = weights_of(engine)
        evaluate()
    return records


def _gradients(engine: Any, batches: list[Any]) -> Pieces:
    from steel_megatron.model.weights import sharded_weights

    engine.accumulate_gradients(batches)
    by_storage = {parameter.data_ptr(): parameter.main_grad for parameter in engine.stage.parameters()}
    return {
        name: by_storage[sharded.data.data_ptr()].double() for name, sharded in sharded_weights(engine.stage).items()
    }


def gradients_twice(
    run: RunConfig, samples: list[list[int]], times: int, evaluate: bool
) -> tuple[dict[str, float], float]:
    """Gradients of one micro batch, and then of the same ``times`` times, in one process.

    Args:
        run: one without parallelism.
        samples: tokens of one micro batch.
        times: how often it comes the second time; its mean is the same.
        evaluate: whether the engine evaluates in between.

    Returns:
        the relative error of the second gradient to the first for each tensor, and the norm of the first.
    """
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.engine import Engine

    topology = initialize(ParallelConfig())
    engine = Engine(run, topology)
    length = len(samples[0]) - 1
    whole = [Sample(torch.tensor(tokens), torch.ones(length, dtype=torch.bool)) for tokens in samples]
    (batch,) = own_batches(whole, run, topology)
    once = _gradients(engine, [batch])
    if evaluate:
        engine.evaluate([batch])
    again = _gradients(engine, [batch] * times)
    norms = {key: float(gradient.norm()) for key, gradient in once.items()}
    errors = {key: float((again[key] - gradient).norm()) / norms[key] for key, gradient in once.items()}
    return errors, sum(norm**2 for norm in norms.values()) ** 0.5


@dataclass
class LoopRecord:
    """What one process saw of a run through the loop: its summary, its steps, and the weights before and after."""

    summary: Any = None
    steps: list[Step] = field(default_factory=list)
    before: Pieces = field(default_factory=dict)
    after: Pieces = field(default_factory=dict)


def through_the_loop(run: RunConfig) -> LoopRecord:
    """A run by :func:`pretrain`, looked at from outside."""
    from steel_megatron.train.engine import Engine
    from steel_megatron.train.loop import pretrain

    record, plain = LoopRecord(), Engine.step

    def step(engine: Engine, batches: Any) -> Any:
        record.before = record.before or weights_of(engine)
        done = plain(engine, batches)
        record.steps.append(Step(done.loss, done.grad_norm, done.lr, done.tokens))
        record.after = weights_of(engine)
        return done

    Engine.step = step  # type: ignore[method-assign]
    record.summary = pretrain(run)
    return record


def validation_batches(runs: list[RunConfig]) -> list[list[list[tuple[list[int], bool]]]]:
    """For each run, this process's micro batches of a validation: the tokens of each row, and whether it counts."""
    from steel_megatron.data.ledger.session import LedgerSession
    from steel_megatron.parallel import agreement
    from steel_megatron.parallel.topology import initialize
    from steel_megatron.train.batches import Batches

    topology, found = initialize(runs[0].parallel), []
    for run in runs:
        ((_, batches),) = Batches(run, topology, LedgerSession(run, agreement)).validation()
        found.append(
            [
                [(row.tolist(), bool(mask.all())) for row, mask in zip(one.tokens, one.loss_mask, strict=True)]
                for one in batches
            ]
        )
        assert all(mask.min() == mask.max() for one in batches for mask in one.loss_mask)
    return found
