"""Which tensors of two checkpoints differ, whatever layouts saved them; a part of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from steel_megatron.train.checkpoint_tensors import RANDOM, TensorFiles


@dataclass(frozen=True)
class Difference:
    """How a tensor differs.

    Attributes:
        name: of the tensor.
        kind: ``only in A``, ``only in B``, ``shape``, ``dtype`` or ``values``; the first that holds.
        a: shape or type in A, where that differs.
        b: the same of B.
        elements: how many differ; 0 where they cannot be compared.
        of: elements of the tensor.
        max_abs: the largest absolute difference.
        max_rel: the same, divided by the largest magnitude in either tensor.
    """

    name: str
    kind: Literal["only in A", "only in B", "shape", "dtype", "values"]
    a: str = ""
    b: str = ""
    elements: int = 0
    of: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common.

    Attributes:
        tensors: names that are in either.
        differences: those that differ, by name.
    """

    tensors: int
    differences: list[Difference]


def compare(a: Path, b: Path, tolerance: float = 0.0) -> Comparison:
    """Compare weights and optimizer state of two checkpoints that were verified.

    Args:
        a: the first one's folder.
        b: the second one's.
        tolerance: largest ``max_rel`` of tensors that count as equal; 0 wants equal numbers.
    """
    first, second = TensorFiles(a), TensorFiles(b)
    names = sorted(name for name in {*first.tensors, *second.tensors} if not name.startswith(RANDOM))
    return Comparison(len(names), [one for name in names for one in _difference(name, first, second, tolerance)])


def _difference(name: str, a: TensorFiles, b: TensorFiles, tolerance: float) -> Iterator[Difference]:
    """How one tensor differs; nothing if it does not."""
    if name not in a.tensors or name not in b.tensors:
        there, kind = (a, "only in A") if name in a.tensors else (b, "only in B")
        yield Difference(name, kind, of=math.prod(there.tensors[name].shape))  # type: ignore[arg-type]
        return
    left, right = a.tensors[name], b.tensors[name]
    if left.shape != right.shape:
        yield Difference(name, "shape", str(list(left.shape)), str(list(right.shape)), of=math.prod(left.shape))
        return
    elements, max_abs, magnitude = 0, 0.0, 0.0
    for box in a.pieces(name):
        x, y = a.read(name, box).double(), b.read(name, box).double()
        elements += int((x != y).sum())
        if x.numel():
            max_abs = max(max_abs, float((x - y).abs().max()))
            magnitude = max(magnitude, float(x.abs().max()), float(y.abs().max()))
    max_rel = max_abs / magnitude if magnitude else 0.0
    numbers = {"elements": elements, "of": math.prod(left.shape), "max_abs": max_abs, "max_rel": max_rel}
    if left.dtype != right.dtype:
        yield Difference(name, "dtype", _short(left.dtype), _short(right.dtype), **numbers)  # type: ignore[arg-type]
    elif elements and not max_rel <= tolerance:  # a NaN differs as well
        yield Difference(name, "values", **numbers)  # type: ignore[arg-type]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
