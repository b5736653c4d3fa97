"""The optimizer's state as tensors that fit any layout.

megatron-core's distributed optimizer cuts the flat parameters of a bucket over the data-parallel processes, wherever
the cuts fall. A flat range of a tensor is a few boxes of it, and torch's checkpoints take boxes of any size, so each
process saves and loads what it holds, in place: nothing is gathered. Everything else in the optimizer's state
dictionary (learning rate, decay, step) follows from the run's settings and the step number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

COUNTS_PER_PARAMETER = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers of torch, which count steps for each parameter; apex's and transformer-engine's have one count for a
group."""

MAIN_WEIGHTS = "optimizer.state.param."
"""Before the name of a weight: its float32 copy, which a run has that computes in bfloat16."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along the axes of a tensor."""


def optimizers_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside of one: one, or two when experts have data-parallel groups of their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer's state before its first step, so that a checkpoint can be loaded into it."""
    for part in optimizers_of(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # zeros, for torch's AdamW and the fused ones
        if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
            for values in part.optimizer.state.values():
                values["step"] = torch.zeros((), dtype=torch.float32, device=values["exp_avg"].device)


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The elements ``start`` to ``end`` of a flattened tensor as boxes of it, in order: at most ``2 * axes - 1``.

    Args:
        shape: of the tensor.
        start: the first element.
        end: the one after the last element.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # rows that are there whole
    cuts = [start, end] if first > last else sorted({start, first * row, last * row, end})
    for begin, stop in itertools.pairwise(cuts):
        index = begin // row
        if begin % row == 0 and stop % row == 0:
            yield (index, *(0 for _ in shape[1:])), ((stop - begin) // row, *shape[1:])
            continue
        for offsets, sizes in boxes(shape[1:], begin - index * row, stop - index * row):
            yield (index, *offsets), (1, *sizes)


def _in_boxes(key: str, flat: torch.Tensor, start: int, weight: ShardedTensor) -> Iterator[ShardedTensor]:
    """A flat range of something in the shape of a weight, as sharded tensors that share its memory."""
    prepended, at = weight.prepend_axis_num, 0
    for offsets, sizes in boxes(tuple(weight.local_shape), start, start + flat.numel()):
        size = math.prod(sizes)
        shape = (1,) * prepended + sizes
        inside = (0,) * prepended + offsets
        yield ShardedTensor(
            key=key,
            data=flat[at : at + size].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_shape=tuple(weight.global_shape),
            global_offset=tuple(a + b for a, b in zip(weight.global_offset, inside, strict=True)),
            axis_fragmentations=None,
            replica_id=(*weight.replica_id[:-1], 0),  # the range is no other data-parallel rank's
        )
        at += size


class OptimizerState:
    """Running means and float32 weights where they lie in memory, to be saved or to be filled from a checkpoint.

    A run in float32 has no second copy of its weights, and none is listed.

    Args:
        optimizer: the run's optimizer, with its state allocated (:func:`allocate_state`).
        weights: the model's, by name; their data are the parameters that it optimizes.

    Attributes:
        sharded: the tensors by a name of their own.
    """

    def __init__(self, optimizer: MegatronOptimizer, weights: Mapping[str, ShardedTensor]) -> None:
        self.sharded: dict[str, ShardedTensor] = {}
        self._optimizer = optimizer
        self._copies: list[Callable[[], None]] = []
        for part in optimizers_of(optimizer):
            for parameter, tensors, start in self._tensors(part):
                inside = _inside(parameter, weights)
                for key, flat in tensors.items():
                    if key == "step" or (key == "param" and _shares_memory(flat, parameter)):
                        continue
                    for name, weight, first in inside:
                        own = flat[max(first - start, 0) : max(first + weight.data.numel() - start, 0)]
                        found = _in_boxes(f"optimizer.state.{key}.{weight.key}", own, max(start - first, 0), weight)
                        self.sharded |= {f"{key}.{name}.{number}": box for number, box in enumerate(found)}

    def _tensors(self, part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], int]]:
        """Each parameter, what an optimizer keeps of it, flat, and from which of its elements on."""
        if not isinstance(part, DistributedOptimizer):  # the parameters are shards, and it keeps all of them
            for parameter in part.get_parameters():
                yield parameter, {key: value.flatten() for key, value in part.optimizer.state[parameter].items()}, 0
            return
        for parameter in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:  # these are copies in float32
                self._copies.append(partial(part._set_main_param_and_optimizer_states, parameter, tensors))
            yield parameter, tensors, part._get_model_param_range_map(parameter)["param"].start

    @property
    def main_weights(self) -> dict[str, ShardedTensor]:
        """The float32 copies of weights among the tensors."""
        return {name: one for name, one in self.sharded.items() if one.key.startswith(MAIN_WEIGHTS)}

    def loaded(self, step: int) -> None:
        """The tensors were filled with the state after ``step`` steps, which Adam's bias correction needs as well."""
        for put_back in self._copies:
            put_back()
        for part in optimizers_of(self._optimizer):
            if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
                for values in part.optimizer.state.values():
                    values["step"].fill_(float(step))
            else:
                for group in part.optimizer.param_groups:
                    group["step"] = step


def _inside(parameter: torch.Tensor, weights: Mapping[str, ShardedTensor]) -> list[tuple[str, ShardedTensor, int]]:
    """The weights that a parameter consists of, one after the other: name, weight, and its first element in it."""
    begin = parameter.storage_offset()
    starts = [
        (name, one, one.data.storage_offset() - begin)
        for name, one in weights.items()
        if _shares_memory(one.data, parameter)
    ]
    found = [(name, one, start) for name, one, start in starts if 0 <= start < parameter.numel()]
    assert sum(one.data.numel() for _, one, _ in found) == parameter.numel()
    return found


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage. Those of a simulated rank have no addresses to compare."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
