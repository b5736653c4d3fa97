"""Replicas of the model with megatron-core's distributed optimizer, and what of their traffic is overlapped."""

from __future__ import annotations

import itertools

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel

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
        if self.use_forward_hook:
            self.start_param_sync(force_sync=True)

    def begin_to_gather(self) -> None:
        """After the optimizer's step, or after one that was skipped; all processes call it."""
        if self.use_forward_hook:
            self.start_param_sync()

    def wait_for_weights(self) -> None:
        """Until then, weights that other processes update may be old; this process alone may call it."""
        if self.use_forward_hook:
            for group in itertools.chain(self.bucket_groups, self.expert_parallel_bucket_groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)
