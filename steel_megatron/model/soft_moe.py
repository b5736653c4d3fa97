"""The Soft-MoE layer, for the ``mlp`` slot of megatron-core's TransformerLayer.

Notation: B sequences of T tokens, hidden size d, E experts with P slots each. The routing mathematics are in
:mod:`steel_megatron.ops`; here they meet experts that are cut over processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from steel_megatron.config import ModelConfig
from steel_megatron.model.experts import Experts
from steel_megatron.ops import combine, dispatch, expert_weights, merge_weights, mixed_tokens
from steel_megatron.parallel.collectives import slots_from_experts, slots_to_experts


class DenseFeedForward(MegatronModule):
    """One feed-forward network for every token.

    Args:
        config: megatron-core's configuration.
        inner_size: its inner width.
        model: the model's settings.
        groups: the process groups.
    """

    def __init__(
        self, config: TransformerConfig, *, inner_size: int, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.network = Experts(
            config,
            num_experts=1,
            inner_size=inner_size,
            activation=model.ffn_activation,
            groups=groups,
            expert_parallel=False,
        )

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """[T, B, d] to ([T, B, d], no bias)."""
        flat = hidden_states.reshape(1, -1, hidden_states.size(-1))
        return self.network(flat).view_as(hidden_states), None


class SoftMoE(MegatronModule):
    """Soft mixture of experts (Soft MoE, arXiv 2308.00951, section 2; Steel-LLM, section 3.1).

    Args:
        config: megatron-core's configuration.
        model: the model's settings: experts, slots, routing mode.
        groups: the process groups.
    """

    def __init__(self, config: TransformerConfig, *, model: ModelConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.model = model
        self.ep_group = groups.ep
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        place = {"dtype": config.params_dtype, "device": device}
        self.phi = torch.nn.Parameter(
            torch.empty(model.hidden_size, model.num_experts, model.slots_per_expert, **place)
        )
        self.scale = torch.nn.Parameter(torch.empty(1, **place))
        self.experts = Experts(
            config,
            num_experts=model.num_experts,
            inner_size=model.ffn_hidden_size,
            activation=model.ffn_activation,
            groups=groups,
            expert_parallel=True,
        )
        self.shared_expert = (
            DenseFeedForward(config, inner_size=model.shared_expert_intermediate_size, model=model, groups=groups)
            if model.shared_expert_intermediate_size
            else None
        )

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """[T, B, d] to ([T, B, d], no bias)."""
        x = hidden_states.transpose(0, 1)
        mode = self.model.routing_mode
        if mode == "merged":
            y = self._merged(x)
        elif mode == "token":
            y = self._token(x)
        else:
            y = self._through_slots(x)
        output = y.transpose(0, 1).contiguous()  # pipeline stages send it as it lies in memory
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)[0]
        return output, None

    def _through_slots(self, x: torch.Tensor) -> torch.Tensor:
        slots, routing = dispatch(
            x,
            self.phi,
            self.scale,
            mode=self.model.routing_mode,
            mix=self.model.routing_mix,
            block_length=self.model.block_length,
        )
        batch, blocks, experts, per_expert, width = slots.shape
        by_expert = slots.permute(2, 0, 1, 3, 4).reshape(experts, -1, width)
        results = self._run_experts(by_expert).view(experts, batch, blocks, per_expert, width)
        return combine(results.permute(1, 2, 0, 3, 4), routing)

    def _token(self, x: torch.Tensor) -> torch.Tensor:
        """Every token through every expert: E times the work of one."""
        experts = self.model.num_experts
        mixed = mixed_tokens(x, self.model.routing_mix).reshape(1, -1, x.size(-1))
        results = self._run_experts(mixed.expand(experts, -1, -1))
        by_expert = expert_weights(x, self.phi, self.scale)
        return torch.einsum("bte,ebtd->btd", by_expert.to(x.dtype), results.view(experts, *x.shape))

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        """One expert per segment, merged by the routing of the segment before (Lory, arXiv 2405.03133)."""
        batch, length, width = x.shape
        block = min(self.model.block_length, length)
        shares = merge_weights(x, self.phi, self.scale, mix=self.model.routing_mix, block_length=block)
        segments = shares.size(1)
        padded = F.pad(x, (0, 0, 0, segments * block - length))
        y = self.experts.forward_merged(padded.reshape(batch * segments, block, width), shares.flatten(0, 1))
        return y.reshape(batch, segments * block, width)[:, :length]

    def _run_experts(self, slots: torch.Tensor) -> torch.Tensor:
        return slots_from_experts(self.experts(slots_to_experts(slots, self.ep_group)), self.ep_group)
