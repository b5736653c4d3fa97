"""The loss of the output layer gives each process of a layout the gradients that whole logits give it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from steel_megatron.config import ParallelConfig, RunConfig
from tests.layouts.pool import Pool
from tests.train.small_run import small_run

TOKENS = 7
"""Of a chunk; a micro batch has 48."""
SMOOTHING = 0.2
LAYOUTS = {
    "alone": ({}, 1),
    "tp2": ({"tensor_model_parallel_size": 2}, 2),
    "tp2 sp": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    "pp2 vpp2": (
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_layers": [0, 1, 1, 0],
        },
        2,
    ),
    "tp2 sp cp2": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
        4,
    ),
}


class Logits(TorchDispatchMode):
    """Notes of how many tokens a tensor has logits, or their gradients, at most.

    Args:
        vocabulary: of this process.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.tokens = vocabulary, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (self.vocabulary,) and one.is_contiguous():
                self.tokens = max(self.tokens, one.numel() // self.vocabulary)
        return result


def both_ways(run: RunConfig) -> tuple[float, float, float, int, int]:
    """The relative errors of loss, evaluation and gradients to those from whole logits; and tokens whose logits are
    held at once, either way."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.model import output_layer
    from steel_megatron.train.engine import Engine, minimised
    from tests.train.small_run import own_batches

    vocabulary = run.model.padded_vocab_size // run.parallel.tensor_model_parallel_size
    output_layer.CHUNK_BYTES = 4 * TOKENS * vocabulary
    output_layer.LEAST_TOKENS = {4: 1}
    engine = Engine(run, topology)
    batches = own_batches(run, 1, topology)
    objective: Any = engine.objective

    def measured() -> tuple[float, float, list[torch.Tensor], int]:
        # Under context parallelism torch's attention takes no tensors that such a mode has seen.
        logits, watched = Logits(vocabulary), run.parallel.context_parallel_size == 1
        with logits if watched else contextlib.nullcontext():
            loss = minimised(engine.accumulate_gradients(batches)).mean
        gradients = [weight.main_grad.double() for model in engine.models for weight in model.parameters()]
        return loss, minimised(engine.evaluate(batches)).mean, gradients, logits.tokens

    ours = measured()
    whole = objective.token_losses
    objective.token_losses = lambda logits, labels: whole(logits, labels)  # an objective of one's own gets logits
    theirs = measured()
    errors = [  # the terms of a single number's gradient cancel
        float((own - other).norm() / other.norm())
        for own, other in zip(ours[2], theirs[2], strict=True)
        if other.numel() > 1 and other.any()
    ]
    return abs(ours[0] / theirs[0] - 1), abs(ours[1] / theirs[1] - 1), max(errors), ours[3], theirs[3]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_whole_logits(layout: str, pool: Pool) -> None:
    options, processes = LAYOUTS[layout]
    run = small_run(ParallelConfig(**options), num_layers=2, vocab_size=1000, hidden_size=16)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, precision="float32"))
    ranks = pool.run(both_ways, processes, run)
    for loss, evaluation, gradients, _, _ in ranks:
        assert loss < 1e-6 and evaluation < 1e-6 and gradients < 2e-6
    if run.parallel.context_parallel_size == 1:
        assert max(rank[3] for rank in ranks) == TOKENS and max(rank[4] for rank in ranks) == 48


def smoothed(run: RunConfig) -> tuple[float, float, float]:
    """The relative errors of a step's loss to torch's smoothed one and of a validation to the plain one, from gathered
    logits in float64; and the gradient's norm."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from steel_megatron.train.engine import Engine, minimised
    from tests.train.small_run import own_batches

    engine = Engine(run, topology)
    batches = own_batches(run, 1, topology)
    losses = []
    for batch in batches:
        with torch.no_grad():
            positions = torch.arange(batch.tokens.size(1)).expand_as(batch.tokens)
            logits = engine.stage(batch.tokens, positions, None)
            logits = gather_from_tensor_model_parallel_region(logits, group=topology.groups.tp)
        counted = batch.loss_mask > 0
        logits = logits[..., : run.model.vocab_size][counted].double()
        losses += [[cross_entropy(logits, batch.labels[counted], label_smoothing=share) for share in (SMOOTHING, 0.0)]]
    smooth, plain = torch.tensor(losses, dtype=torch.float64).mean(dim=0).tolist()
    validated, step = minimised(engine.evaluate(batches)).mean, engine.step(batches)
    return abs(step.loss / smooth - 1), abs(validated / plain - 1), step.grad_norm


def test_label_smoothing_is_torchs_and_in_training_alone(pool: Pool) -> None:
    norms = []
    for layout in ("alone", "tp2"):
        options, processes = LAYOUTS[layout]
        run = small_run(ParallelConfig(**options), num_layers=2, vocab_size=90, hidden_size=16)  # and 38 of padding
        training = dataclasses.replace(run.training, precision="float32", label_smoothing=SMOOTHING)
        for error, validated, norm in pool.run(smoothed, processes, dataclasses.replace(run, training=training)):
            assert error < 1e-6 and validated < 1e-6
            norms.append(norm)
    assert norms == pytest.approx(norms[:1] * 3, rel=1e-5)
