"""The optimizer's state as tensors that fit any layout.

megatron-core's distributed optimizer can give its state in the shape of the model's parameters, which loads under
other parallel sizes. Only those tensors are kept: everything else in its state dictionary (learning rate, decay,
step) follows from the run's settings and the step number.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

OptimizerState = dict[str, Any]

COUNTS_PER_PARAMETER = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers of torch, which count steps for each parameter; the fused ones have one count for a group."""


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside: one, or two when experts have data-parallel groups of their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer's state before its first step, so that a checkpoint can be loaded into it."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # zeros, for torch's AdamW and the fused ones
        if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
            for values in part.optimizer.state.values():
                values["step"] = torch.zeros((), dtype=torch.float32)


def sharded_state(optimizer: MegatronOptimizer, model_state: ShardedStateDict, *, is_loading: bool) -> OptimizerState:
    """Running means and float32 weights as sharded tensors, named after the model's parameters.

    Args:
        optimizer: the run's optimizer.
        model_state: the model's sharded state.
        is_loading: whether the result is to be filled from a checkpoint.
    """
    return {
        str(index): part.sharded_param_state_fully_reshardable(model_state, is_loading, {})
        for index, part in enumerate(_parts(optimizer))
    }


def load_state(optimizer: MegatronOptimizer, state: OptimizerState, step: int) -> None:
    """Put loaded tensors into the optimizer.

    Args:
        optimizer: the run's, with its state allocated (:func:`allocate_state`).
        state: what :func:`sharded_state` described, filled from a checkpoint.
        step: optimizer steps done, for Adam's bias correction.
    """
    for index, part in enumerate(_parts(optimizer)):
        own = [part.optimizer.state[p] for group in part.optimizer.param_groups for p in group["params"]]
        for values in own:
            values.pop("step", None)  # megatron-core's loader does not expect torch's count
        part.load_parameter_state_from_fully_reshardable(state[str(index)])
        if isinstance(part.optimizer, COUNTS_PER_PARAMETER):
            for values in own:
                values["step"] = torch.tensor(float(step), dtype=torch.float32)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = step
