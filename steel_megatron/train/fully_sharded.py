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
from steel_megatron.model.weights import SHARDS, sharded_weights
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.optimizer_state import optimizers_of


class FullySharded(_BaseDataParallel):
    """A pipeline stage whose weights are sharded over the data- and context-parallel processes.

    Experts that expert-parallel processes share are sharded over the processes that hold the same ones.

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
        names = {id(parameter): name for name, parameter in stage.named_parameters()}
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
        stage.__dict__[SHARDS] = {
            key: own for key, one in whole.items() if (own := self._shard_of(one, names[id(one.data)])) is not None
        }

    def _shard_of(self, whole: ShardedTensor, name: str) -> ShardedTensor | None:
        """This process's shard of a weight in a checkpoint; None if it has none."""
        sharded, shard = self._sharded[name]
        if not shard.numel():
            return None
        (placement,) = sharded.placements
        dim, ranks = cast(Shard, placement).dim, sharded.device_mesh.size()
        offset = list(whole.global_offset)
        offset[whole.prepend_axis_num + dim] += -(-sharded.size(dim) // ranks) * sharded.device_mesh.get_local_rank()
        return replace(
            whole,
            data=shard,
            dtype=shard.dtype,
            local_shape=tuple(shard.shape),
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

    for module in stage.modules():
        if isinstance(module, Experts) and module.ep_group is not None:
            unit(module, module.copies_group)
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
