"""What a case does in launched processes, and how it is held to one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steel_megatron.config import RunConfig
from tests.hf.launched import Pieces, pieces
from tests.train.small_run import Trained, gradient_squares, norms_of_tensors, own_batches


@dataclass
class Record:
    """What one process saw of a run.

    Attributes:
        steps: losses, gradient norms and squares of its parts of the gradient.
        evaluation: (loss, labels) after the last step.
        before: its parts of the initial weights.
        after: its parts of the last weights.
    """

    steps: list[Trained] = field(default_factory=list)
    evaluation: tuple[float, int] = (math.nan, 0)
    before: Pieces = field(default_factory=dict)
    after: Pieces = field(default_factory=dict)


def follow(run: RunConfig) -> Record:
    """Train all steps of a run."""
    from steel_megatron.parallel.topology import initialize

    topology = initialize(run.parallel)
    from steel_megatron.train.engine import Engine, minimised

    engine = Engine(run, topology)
    record = Record(before=weights_of(engine))
    for step in range(1, run.training.train_steps + 1):
        result = engine.step(own_batches(run, step, topology))
        record.steps.append(Trained(result.loss, result.grad_norm, gradient_squares(engine)))
    record.evaluation = tuple(minimised(engine.evaluate(own_batches(run, 0, topology))))
    record.after = weights_of(engine)
    return record


def weights_of(engine: Any) -> Pieces:
    """This process's parts of the weights."""
    return pieces(engine.chunks, lambda weight: weight.detach().float().clone())


@dataclass(frozen=True)
class Bounds:
    """Relative errors that are rounding.

    Attributes:
        loss: of losses.
        norm: of gradient norms.
        gradient: of the gradient's norm of one tensor, relative to it plus a hundredth of the whole gradient's: terms
            cancel in the one number of a routing's scale.
        weights: of one tensor's last weights, relative to how far it moved plus a hundredth of its size.
    """

    loss: float
    norm: float
    gradient: float
    weights: float


EXACT = Bounds(1e-5, 1e-5, 1e-5, 1e-5)
WIDE = Bounds(2e-3, 0.03, 0.2, 0.3)
"""A token of top_k_moe that is as near to one expert as to another goes to either."""


@dataclass(frozen=True)
class Difference:
    """A number that is not what it is in one process.

    Attributes:
        what: the quantity, its step and its tensor.
        ours: the layout's.
        theirs: that of one process.
        error: relative error.
        bound: what it may be.
    """

    what: str
    ours: float
    theirs: float
    error: float
    bound: float

    def __str__(self) -> str:
        off = f"off by {self.error:.1e}, allowed {self.bound:.0e}"
        return f"{self.what} is {self.ours:.9g} instead of {self.theirs:.9g}: {off}"


def compared(ranks: Sequence[Record], one: Record, bounds: Bounds) -> Iterator[Difference]:
    """Every number of a layout beside that of one process, in the order in which they came to be."""
    for number, theirs in enumerate(one.steps, start=1):
        ours = [rank.steps[number - 1] for rank in ranks]
        for rank, step in enumerate(ours):
            on = f"step {number}: the {{}} on rank {rank}"
            yield _relative(on.format("loss"), step.loss, theirs.loss, bounds.loss)
            yield _relative(on.format("gradient norm"), step.grad_norm, theirs.grad_norm, bounds.norm)
        expected, found = norms_of_tensors([theirs]), norms_of_tensors(ours)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        for name, norm in expected.items():
            # The other factor of an adapter begins as 0.
            assert norm > 0 or (number == 1 and "lora_A" in name), f"step {number}: nothing reaches {name}"
            scale = norm + 0.01 * theirs.grad_norm
            what = f"step {number}: the gradient's norm of {name}"
            yield Difference(what, found[name], norm, abs(found[name] - norm) / scale, bounds.gradient)
    for rank in ranks:
        yield _relative("the evaluation's loss", rank.evaluation[0], one.evaluation[0], bounds.loss)
        yield _relative("the evaluation's number of labels", rank.evaluation[1], one.evaluation[1], 0.0)
    before, after = whole_tensors([one.before]), whole_tensors([one.after])
    found_before, found_after = (whole_tensors([getattr(rank, when) for rank in ranks]) for when in ("before", "after"))
    assert found_after.keys() == after.keys() == before.keys() == found_before.keys()
    for name, weights in after.items():
        assert torch.equal(found_before[name], before[name]), f"the initial weights of {name} differ"
        scale = float((weights - before[name]).norm() + 0.01 * weights.norm())
        ours, error = found_after[name], float((found_after[name] - weights).norm())
        what = f"step {len(one.steps)}: the norm of the weights {name}"
        yield Difference(what, float(ours.norm()), float(weights.norm()), error and error / scale, bounds.weights)


def _relative(what: str, ours: float, theirs: float, bound: float) -> Difference:
    error = abs(ours - theirs) / abs(theirs) if ours != theirs else 0.0
    return Difference(what, ours, theirs, error, bound)


def whole_tensors(ranks: Sequence[Pieces]) -> Pieces:
    """Whole tensors of all layers by name, from parts of them; copies on several processes are the very same.

    Args:
        ranks: what each process holds, as :func:`tests.hf.launched.pieces` labels it.
    """
    parts: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for rank, held in enumerate(ranks):
        for label, part in held.items():
            key, offsets, prepended = label.split("|")
            at = tuple(int(number) for number in offsets.split(","))
            part = part.reshape((1,) * int(prepended) + tuple(part.shape))
            first = parts.setdefault(key, {}).setdefault(at, part)
            assert torch.equal(first, part), f"rank {rank} has another copy of {key} at {at}"
    whole = {}
    for key, placed in parts.items():
        shape = [max(at[axis] + part.size(axis) for at, part in placed.items()) for axis in range(len(min(placed)))]
        whole[key] = torch.full(shape, math.nan)
        for at, part in placed.items():
            whole[key][tuple(slice(start, start + size) for start, size in zip(at, part.shape, strict=True))] = part
        assert not whole[key].isnan().any(), f"nobody has all of {key}, or it is not a number"
    return whole
