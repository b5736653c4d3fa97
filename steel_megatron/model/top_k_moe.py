"""megatron-core's own mixture of experts with hard top-k routing: the baseline that Soft-MoE is compared with.

Router (softmax over the k best logits; with k = 1 over all), load-balancing loss (Switch Transformer, arXiv 2101.03961,
section 2.2), dispatch without dropping tokens, and SwiGLU experts one after another are megatron-core's; here they get
settings, names for checkpoints, and losses of the router that weigh the same under every layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from steel_megatron.config import ModelConfig, ParallelConfig


def top_k_moe_settings(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that only this layer needs; none for other models.

    Args:
        model: the model's settings.
        parallel: the sizes of the layout.
        device: where the layer computes.
    """
    if model.ffn != "top_k_moe":
        return {}
    # Where processes share both the experts and their matrices, tokens that came to one of them are gathered for the
    # others: unequally many, which gloo cannot.
    unequal = min(parallel.expert_model_parallel_size, parallel.expert_tensor_size) > 1
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.moe_top_k,
        # Over the best one alone, the softmax would be 1 and the router would learn nothing.
        "moe_router_pre_softmax": model.moe_top_k == 1,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "allgather" if unequal and device.type == "cpu" else "alltoall",
    }


class Router(TopKRouter):
    """megatron-core's router, whose losses weigh the same however many processes share a sequence.

    The schedule divides all gradients by the number of labels at the end, so a loss that is a mean over tokens has to
    be multiplied by the number of tokens before. megatron-core 0.16.1 multiplies by this process's tokens what it has
    divided by those of all processes that share the sequences, and ``seq_aux_loss`` by the tokens of one sequence.
    """

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        *unused: Any,
        **further: Any,
    ) -> torch.Tensor:
        """Let the backward pass through the routing probabilities begin with the gradient of the load-balancing loss.

        Args:
            activation: [tokens of this process, experts], the probabilities.
            aux_loss_coeff: in ``aux_loss`` already.
            aux_loss: this process's part of the loss, a mean over the tokens of ``reduce_group``.
            aux_loss_name: not used.
            reduce_group: the processes that share the sequences.
            unused: what megatron-core counts and logs.
            further: the same.
        """
        tokens = activation.size(0) * reduce_group.size()
        result: torch.Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)
        return result

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The same for the loss that keeps logits small (ST-MoE, arXiv 2202.08906, equation 5), summed over tokens.

        Args:
            logits: [tokens of this process, experts].
            padding_mask: None; sequences are not padded.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        loss = coefficient * logits.logsumexp(-1).square().sum()
        result: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, loss)
        return result


class TopKMoE(MoELayer):
    """megatron-core's MoE layer for the ``mlp`` slot.

    Args:
        config: megatron-core's configuration, with :func:`top_k_moe_settings`.
        groups: the process groups; experts are shared over ``groups.ep``, their matrices cut over ``groups.expt_tp``.
    """

    def __init__(self, config: TransformerConfig, *, groups: ProcessGroupCollection, **unused: Any) -> None:
        assert groups.tp.size() == 1 or config.sequence_parallel, "checked by check_layout"
        network = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(module=SequentialMLP, submodules=network)
        super().__init__(config, submodules=MoESubmodules(experts=experts, router=Router), pg_collection=groups)
        self.groups = groups
        # Whether other processes hold copies of the experts than of the other weights. megatron-core does not mark
        # experts that are cut over fewer processes than the rest, unless expert-parallel processes share them.
        self.experts_apart = groups.ep.size() > 1 or groups.expt_tp.size() != groups.tp.size()
        for weight in self.experts.parameters():
            setattr(weight, "allreduce", not self.experts_apart)  # noqa: B010

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """The weights for megatron-core's checkpoints, each expert's under its number in the whole layer.

        The up projection has the rows of the gate and then those of the value. Where processes share it, each has some
        of both: two tensors.

        Args:
            prefix: of the weights' names, with its dot.
            sharded_offsets: (axis, index of this part, number of parts) of each axis in front of a weight's own, such
                as the layers'.
            metadata: megatron-core's; not used.

        Returns:
            The weights by name, prefix included.
        """
        groups, axis = self.groups, len(sharded_offsets)
        rank, size = groups.expt_tp.rank(), groups.expt_tp.size()
        copy = (0, 0, dist.get_rank(groups.expt_dp if self.experts_apart else groups.dp_cp))

        def part(
            key: str, data: torch.Tensor, *cut: tuple[int, int, int], replica: tuple[int, int, int]
        ) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                prefix + key, data, *sharded_offsets, *cut, replica_id=replica, prepend_axis_num=axis
            )

        sharded = {}
        for name, weight in self.router.named_parameters(prefix="router"):
            sharded[prefix + name] = part(name, weight, replica=(0, groups.tp.rank(), dist.get_rank(groups.dp_cp)))
        for local, expert in enumerate(self.experts.local_experts):
            number = groups.ep.rank() * self.num_local_experts + local
            name, key = (f"experts.local_experts.{index}.linear_fc" for index in (local, number))
            up, down = expert.linear_fc1.weight, expert.linear_fc2.weight
            sharded[f"{prefix}{name}2.weight"] = part(f"{key}2.weight", down, (axis + 1, rank, size), replica=copy)
            if size == 1:
                sharded[f"{prefix}{name}1.weight"] = part(f"{key}1.weight", up, replica=copy)
                continue
            for index, (half, rows) in enumerate(zip(("gate", "value"), up.detach().chunk(2), strict=True)):
                cut = (axis, index * size + rank, 2 * size)
                sharded[f"{prefix}{name}1.weight.{half}"] = part(f"{key}1.weight", rows, cut, replica=copy)
        return sharded
