"""megatron-core's own mixture of experts with hard top-k routing: the baseline that Soft-MoE is compared with.

Router (softmax over the k best logits; with k = 1 over all), load-balancing loss (Switch Transformer, arXiv 2101.03961,
section 2.2), dispatch without dropping tokens, and SwiGLU experts one after another are megatron-core's; here they only
get settings, and names for checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from steel_megatron.config import ModelConfig


def top_k_moe_settings(model: ModelConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that only this layer needs; none for other models."""
    if model.ffn != "top_k_moe":
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.moe_top_k,
        # Over the best one alone, the softmax would be 1 and the router would learn nothing.
        "moe_router_pre_softmax": model.moe_top_k == 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "allgather",  # within one process it sends nothing
    }


class TopKMoE(MoELayer):
    """megatron-core's MoE layer for the ``mlp`` slot.

    Args:
        config: megatron-core's configuration, with :func:`top_k_moe_settings`.
        groups: the process groups; neither experts nor their matrices are cut.
    """

    def __init__(self, config: TransformerConfig, *, groups: ProcessGroupCollection) -> None:
        assert groups.tp.size() == groups.ep.size() == 1, "checked by check_layout"
        network = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(module=SequentialMLP, submodules=network)
        super().__init__(config, submodules=MoESubmodules(experts=experts), pg_collection=groups)
        self.copies_group = groups.dp_cp

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """The weights for megatron-core's checkpoints, whole.

        megatron-core would store gate and value of an expert's up projection separately, so that they can be sharded.
        Here nothing is sharded.

        Args:
            prefix: of the weights' names, with its dot.
            sharded_offsets: (axis, index of this part, number of parts) of each axis in front of a weight's own, such
                as the layers'.
            metadata: megatron-core's; not used.

        Returns:
            The weights by name, prefix included.
        """
        return {
            prefix + name: ShardedTensor.from_rank_offsets(
                prefix + name,
                weight,
                *sharded_offsets,
                replica_id=(0, 0, dist.get_rank(self.copies_group)),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, weight in self.named_parameters()
        }
