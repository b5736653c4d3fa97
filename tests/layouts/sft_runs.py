"""Runs of supervised finetuning on documents of the tests' own, packed or each in a sequence of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_megatron.config import CheckpointConfig, DataConfig, ParallelConfig, PrepareConfig, RunConfig
from steel_megatron.data.indexed.labels import LABEL
from steel_megatron.data.ledger.loader import SampleArrays
from steel_megatron.data.preprocessing.chat import prepare
from steel_megatron.data.sampling.whole import best_fit
from steel_megatron.errors import SteelError
from tests.fixtures.make_tokenizer import make_tokenizer
from tests.layouts.features import BASE
from tests.train.small_run import Trained, gradient_squares

Document = tuple[np.ndarray, np.ndarray]
"""Token ids and labels."""
MODES: dict[str, dict[str, Any]] = {
    "block_causal": {"block_length": 5},
    "sequence": {"routing_mode": "sequence"},
    "token": {"routing_mode": "token"},
    "merged": {"routing_mode": "merged", "block_length": 4},
    "dense": {"ffn": "dense", "routing_mode": None},
    "top_k_moe": {
        "ffn": "top_k_moe",
        "routing_mode": None,
        "ffn_activation": "swiglu",
        "moe_aux_loss_coeff": 0.0,
    },
}


def sft_run(parallel: ParallelConfig, mode: str, objective: str = "sft", micro: int = 2, steps: int = 2) -> RunConfig:
    training = dataclasses.replace(BASE.training, train_steps=steps, micro_batch_size=micro, objective=objective)
    model = dataclasses.replace(BASE.model, **MODES[mode])
    # Terms of the size of the gradient's rounding would move weights by as much as others.
    optimizer = dataclasses.replace(BASE.optimizer, epsilon=1e-3)
    data = DataConfig(reset_at_eod=True)
    return dataclasses.replace(BASE, model=model, parallel=parallel, data=data, training=training, optimizer=optimizer)


def documents_of(seed: int, count: int = 12) -> list[Document]:
    """Documents of 2 to 16 tokens, whose later tokens are labels, some of them not; one has a single label."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(random.integers(2, 17))
        labels = (random.random(size) < 0.8) & (np.arange(size) >= random.integers(1, size))
        labels[-1] = number % 7 != 3 or not labels.any()
        made.append((random.integers(0, 100, size), labels * LABEL))
    return made


def packed(documents: Sequence[Document], rows: int, length: int) -> SampleArrays:
    """Documents in so many samples, the rest of which is padding."""
    longest = sorted(range(len(documents)), key=lambda number: -len(documents[number][0]))
    places = best_fit(np.array([len(documents[number][0]) for number in longest]), length)
    assert places.max(initial=0) < rows, (places.max(), rows)
    tokens, starts, labels = (np.zeros((rows, length + 1), dtype=np.int64) for _ in range(3))
    owner, ends = np.full((rows, length + 1), -1), np.zeros(rows, dtype=np.int64)
    for number, row in zip(longest, places.tolist(), strict=True):
        ids, own = documents[number]
        at = slice(int(ends[row]), int(ends[row]) + len(ids))
        tokens[row, at], labels[row, at], starts[row, at], owner[row, at] = ids, own, at.start, number
        ends[row] = at.stop
    for row, end in enumerate(ends.tolist()):
        starts[row, end:] = end
    return SampleArrays(tokens, starts, labels, owner)


def alone(documents: Sequence[Document], rows: int, length: int) -> SampleArrays:
    """Each document in a sample of its own."""
    each = [packed([document], 1, length) for document in documents] + [packed([], 1, length)] * rows
    joined = SampleArrays(*(np.concatenate(values)[:rows] for values in zip(*each, strict=True)))
    owners = np.where(joined.documents < 0, -1, np.arange(rows)[:, None])
    return joined._replace(documents=owners)


def own_batches(run: RunConfig, arrays: SampleArrays, topology: Any) -> list[Any]:
    """This process's micro batches of a global batch."""
    from steel_megatron.train.objective.base import objective_of

    micro, apart = run.training.micro_batch_size, topology.data_parallel_size
    first = topology.data_parallel_rank * micro
    batches = []
    for at in range(first, len(arrays.tokens), micro * apart):
        tokens, starts, labels, documents = (values[at : at + micro] for values in arrays)
        batches.append(objective_of(run).batch(tokens, starts, None, topology, labels, documents))
    return batches


def train(run: RunConfig, in_rows: str = "packed") -> list[Trained]:
    """Train, on 8 samples a step if the documents are packed, else on as many as there are documents."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine

    engine, trained = Engine(run, topology), []
    for step in range(run.training.train_steps):
        documents, length = documents_of(step), run.model.sequence_length
        arrays = packed(documents, 8, length) if in_rows == "packed" else alone(documents, 24, length)
        result = engine.step(own_batches(run, arrays, topology))
        assert result.skipped is None
        trained.append(Trained(result.loss, result.grad_norm, gradient_squares(engine)))
    return trained


def train_all(runs: Sequence[RunConfig], in_rows: str = "packed") -> list[list[Trained]]:
    return [train(run, in_rows) for run in runs]


def prepared(folder: Path) -> str:
    """A corpus of conversations; its prefix."""
    make_tokenizer(folder / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": f"How much is {number}?"}, {"role": "assistant", "content": said}]}
        for number, said in enumerate(("One.", "Two and a half.", "Nobody knows that.") * 12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"output_prefix": str(folder / "chat"), "tokenizer_path": str(folder / "tokenizer"), "max_tokens": 96}
    prepare(PrepareConfig(inputs=[str(folder / "rows.jsonl")], **names), "sft")
    return f"{folder / 'chat'}_messages_document"


def run_of(
    prefix: str, directory: Path, parallel: ParallelConfig, objective: str = "sft", **training: Any
) -> RunConfig:
    """A run that finetunes on a corpus, and validates on it."""
    run = sft_run(parallel, "block_causal", objective, micro=1, steps=6)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=2100, sequence_length=96),
        data=DataConfig(train=[prefix], validation=[prefix], reset_at_eod=objective != "next_token"),
        training=dataclasses.replace(run.training, global_batch_size=4, eval_interval=3, eval_steps=50, **training),
        checkpoint=CheckpointConfig(directory=str(directory), save_interval=3),
    )


def pretrained(run: RunConfig) -> tuple[list[float], float | None] | str:
    """The losses of a run's steps and its last validation, or why it was refused."""
    from steel_megatron.train.loop import pretrain

    try:
        summary = pretrain(run)
    except SteelError as error:
        return str(error)
    return list(summary.losses), summary.validation_loss
