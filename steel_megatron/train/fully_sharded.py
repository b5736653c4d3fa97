"""Fully sharded data parallelism: torch's FSDP2 where megatron-core expects its DistributedDataParallel.

Each process holds a shard of every weight, of its gradient and of its optimizer state. A layer's weights are gathered
before it computes, forward and backward, and freed afterwards; its gradients are reduce-scattered in float32 after each
micro batch. megatron-core's schedules and optimizers see the shards as ordinary parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from steel_megatron.model.experts import Experts
from steel_megatron.model.top_k_moe import TopKMoE
from steel_megatron.model.weights import SHARDS, sharded_weights
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.optimizer_state import optimizers_of


class FullySharded(_BaseDataParallel):
    """A pipeline stage whose weights are sharded over the data- and context-parallel processes.

    Experts that are cut over other processes than the rest are sharded over the processes that hold the same ones.

    Args:
        stage: this process's part of the model, whole over data-parallel processes. It is sharded in place, and its
            weights become float32; what it computes stays in their type.
        topology: the process groups.
    """

    def __init__(self, stage: GPTModel, topology: Topology) -> None:
        super().__init__(config=stage.config, module=stage)
        # Only what megatron-core asks of any data parallelism; it must not take this for its own FSDP.
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        whole = sharded_weights(stage)
        places = {key: (one, *_place(stage, one.data)) for key, one in whole.items()}
        marks = {name: dict(vars(parameter)) for name, parameter in stage.named_parameters()}
        policy = MixedPrecisionPolicy(
            param_dtype=stage.config.params_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary embeddings stay in float32
        )
        for parameter in stage.parameters():
            parameter.data = parameter.data.float()
        _shard(stage, topology, policy)
        self._sharded: dict[str, tuple[DTensor, torch.nn.Parameter]] = {}
        for name, sharded in stage.named_parameters():
            shard = torch.nn.Parameter(cast(DTensor, sharded)._local_tensor)
            shard.__dict__.update(marks[name])
            self._sharded[name] = cast(DTensor, sharded), shard
        stage.__dict__[SHARDS] = {key: own for key, one in places.items() if (own := self._shard_of(*one)) is not None}

    def _shard_of(self, whole: ShardedTensor, name: str, row: int) -> ShardedTensor | None:
        """This process's shard of a tensor in a checkpoint, which is part of a parameter; None if it has none of it.

        Args:
            whole: the tensor, as it is without data parallelism.
            name: of the parameter.
            row: the parameter's row that the tensor begins with.
        """
        sharded, shard = self._sharded[name]
        (placement,) = sharded.placements
        dim, ranks = cast(Shard, placement).dim, sharded.device_mesh.size()
        first = -(-sharded.size(dim) // ranks) * sharded.device_mesh.get_local_rank()  # along the axis that is cut
        offset = list(whole.global_offset)
        if dim == 0:
            begin, end = max(row, first), min(row + whole.local_shape[0], first + shard.size(0))
            own = shard[begin - first : max(end, begin) - first]
            offset[whole.prepend_axis_num] += begin - row
        else:
            own = shard[row : row + whole.local_shape[0]]
            offset[whole.prepend_axis_num + dim] += first
        if not own.numel():
            return None
        return replace(
            whole,
            data=shard if own.numel() == shard.numel() else own.detach(),
            dtype=shard.dtype,
            local_shape=tuple(own.shape),
            global_offset=tuple(offset),
            axis_fragmentations=None,  # the last shard may be smaller
            replica_id=(*cast(tuple, whole.replica_id)[:-1], 0),
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This process's shards, by the names of the stage's parameters; without those of which it has nothing."""
        return ((name, shard) for name, (_, shard) in self._sharded.items() if shard.numel())

    def begin_to_gather(self) -> None:
        """Nothing: each layer gathers its weights when it computes."""

    def wait_for_weights(self) -> None:
        """Nothing: a process's own shards are always up to date."""

    def zero_grad_buffer(self) -> None:
        """Drop the gradients."""
        for sharded, shard in self._sharded.values():
            sharded.grad = None
            shard.__dict__.pop("main_grad", None)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Show the summed gradients to the optimizer: zeros where nothing reached a weight."""
        for sharded, shard in self._sharded.values():
            grad = cast(DTensor | None, sharded.grad)
            main_grad = torch.zeros_like(shard, requires_grad=False) if grad is None else grad._local_tensor
            setattr(shard, "main_grad", main_grad)  # noqa: B010

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Multiply all gradients.

        Args:
            scaling_factor: a number or a tensor of one.
        """
        for _, shard in self._sharded.values():
            shard.main_grad.mul_(scaling_factor)  # type: ignore[attr-defined] # see finish_grad_sync


def _place(stage: GPTModel, weight: torch.Tensor) -> tuple[str, int]:
    """The name of the parameter that a tensor is all of, or some rows of, and the first of these rows."""
    for name, parameter in stage.named_parameters():
        if parameter.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            return name, (weight.storage_offset() - parameter.storage_offset()) // max(parameter.stride(0), 1)
    raise AssertionError("a tensor of no parameter")


def _shard(stage: GPTModel, topology: Topology, policy: MixedPrecisionPolicy) -> None:
    """Make one unit of each layer, of the embedding and of the output layer, and one of what is left."""
    groups = topology.groups

    def unit(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
        mesh = DeviceMesh.from_group(group, topology.device.type)

        def placement(parameter: torch.nn.Parameter) -> Shard:
            even = (dim for dim, size in enumerate(parameter.shape) if size % group.size() == 0)
            return Shard(next(even, 0))  # only the first axis may be cut unevenly

        fully_shard(module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=placement, mp_policy=policy)
        own = cast(FSDPModule, module)
        # Gradients are sums: megatron-core divides them by the number of labels. gloo has no other reduction.
        own.set_force_sum_reduction_for_comms(True)
        own.set_gradient_divide_factor(1.0)

    for module in list(stage.modules()):
        if isinstance(module, Experts) and module.apart:
            unit(module, module.copies_group)
        elif isinstance(module, TopKMoE) and module.experts_apart:
            unit(module.experts, module.groups.expt_dp)
    parts = [*stage.decoder.layers, getattr(stage, "embedding", None), getattr(stage, "output_layer", None)]
    for part in parts:
        if part is not None:
            unit(part, groups.dp_cp)
    unit(stage, groups.dp_cp)


def reduce_over_all_ranks(optimizer: MegatronOptimizer) -> None:
    """Let an optimizer of shards sum its gradient norm over all processes, as the distributed optimizer does."""
    for part in optimizers_of(optimizer):
        part.grad_stats_parallel_group = dist.group.WORLD


@contextmanager
def whole_weights(module: torch.nn.Module) -> Iterator[None]:
    """Gather a layer's weights for a while, if they are sharded; all data-parallel processes call it.

    Args:
        module: a layer of the decoder.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
