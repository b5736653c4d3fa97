"""Replicas of the model with megatron-core's distributed optimizer, and what of their traffic is overlapped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.models.gpt import GPTModel

from steel_megatron.ops.cross_entropy import add_
from steel_megatron.parallel.topology import Topology


class Replicated(DistributedDataParallel):
    """A pipeline stage that each data-parallel process has whole; gradients and optimizer state are sharded.

    With ``overlap_param_gather``, all processes begin to gather updated weights at the end of a step. The forward pass
    waits for those of a module before it computes it, so between steps a weight may not have arrived yet:
    :meth:`wait_for_weights` comes before anything that reads them.

    Args:
        stage: this process's part of the model.
        topology: the process groups.
    """

    def __init__(self, stage: GPTModel, topology: Topology) -> None:
        parallel, on_gpu = topology.parallel, topology.device.type == "cuda"
        # One bucket has nothing to overlap with: without overlap_grad_reduce there are no others.
        reduce = parallel.overlap_grad_reduce
        reduce = on_gpu or bool(parallel.overlap_param_gather) if reduce is None else reduce
        gather = parallel.overlap_param_gather
        super().__init__(
            config=stage.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=reduce,
                overlap_param_gather=on_gpu and reduce if gather is None else gather,
                align_param_gather=True,  # all buckets are sent at once, so waiting for one needs no other process
            ),
            module=stage,
            pg_collection=topology.groups,
        )
        for group in self._bucket_groups:
            if group.intra_distributed_optimizer_instance_size == 1:
                group.__class__ = _WithoutTraffic
        if self.use_forward_hook:
            self.start_param_sync(force_sync=True)

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        """Adds a weight's gradient to the buffer, in one pass whatever its type.

        A module that has added it there itself gives autograd none (:mod:`steel_megatron.model.output_layer`).
        """

        def hook(*_: object) -> None:
            if param.grad is not None and not param.grad_added_to_main_grad:  # type: ignore[attr-defined]
                add_(param.main_grad, param.grad)  # type: ignore[attr-defined]
            param.grad = None
            if self.ddp_config.overlap_grad_reduce:
                self.param_to_bucket_group[param].register_grad_ready(param, self.force_all_reduce)

        return hook

    @property
    def _bucket_groups(self) -> list[_ParamAndGradBucketGroup]:
        return [*self.bucket_groups, *self.expert_parallel_bucket_groups]

    def begin_to_gather(self) -> None:
        """After the optimizer's step, or after one that was skipped; all processes call it."""
        if self.use_forward_hook:
            self.start_param_sync()

    def wait_for_weights(self) -> None:
        """Until then, weights that other processes update may be old; this process alone may call it."""
        if self.use_forward_hook:
            for group in self._bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


class _WithoutTraffic(_ParamAndGradBucketGroup):
    """Buckets that no other process shares: gradients are reduced and weights gathered as they are.

    Backends copy a whole buffer to itself where a group has one process. The gradients of this library are sums
    (``calculate_per_token_loss``), so there is no factor to apply either.
    """

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """There is nothing to add."""
        assert all(bucket.gradient_scaling_factor == 1.0 for bucket in self.buckets)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """There is nothing to wait for."""
        self.param_gather_dispatched = False
        self.start_grad_sync()

    def start_param_sync(self, force_sync: bool = False) -> None:
        """All weights are here."""
        self.param_gather_dispatched = True

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """All weights are here."""
