"""The Soft-MoE layer, for the ``mlp`` slot of megatron-core's TransformerLayer.

Notation: B sequences of T tokens, hidden size d, E experts with P slots each. The routing mathematics are in
:mod:`steel_megatron.ops`; here they meet experts that are cut over processes, and sequences that are
(:mod:`steel_megatron.model.routing.split`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from steel_megatron.config import ModelConfig
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.experts import Experts, Rows
from steel_megatron.model.routing.split import dispatch_split, local_plan_of_one_document, merge_weights_split
from steel_megatron.ops import Routing, combine, expert_weights, merge_weights, mixed_tokens
from steel_megatron.ops.plan import block_plan
from steel_megatron.ops.soft_moe import dispatch_blocks, merge_weights_of_documents
from steel_megatron.parallel.collectives import gather_copies, own_part, slots_from_experts, slots_to_experts
from steel_megatron.parallel.sequence import SequenceSplit


class DenseFeedForward(MegatronModule):
    """One feed-forward network for every token.

    Under sequence parallelism the tokens of the tensor-parallel processes are gathered before it and its results
    scattered after it, as around any matrix that is cut over these processes; under context parallelism each process
    computes its own.

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
        self.rows: Rows = "own" if config.sequence_parallel else "copied"

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """[T, B, d] to ([T, B, d], no bias); T are this process's tokens."""
        flat = hidden_states.reshape(1, -1, hidden_states.size(-1))
        return self.network(flat, self.rows).reshape(hidden_states.shape), None


class SoftMoE(MegatronModule):
    """Soft mixture of experts (Soft MoE, arXiv 2308.00951, section 2; Steel-LLM, section 3.1).

    Where processes share sequences, each routes its own tokens. In modes ``sequence`` and ``block_causal`` only slots
    travel. In ``token`` and ``merged`` and for the shared expert, every token passes through experts: under sequence
    parallelism tokens travel to them as to any dense layer, under context parallelism they stay.

    Args:
        config: megatron-core's configuration.
        model: the model's settings: experts, slots, routing mode.
        groups: the process groups.
        documents: which documents the sequences hold.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        groups: ProcessGroupCollection,
        documents: PackedDocuments | None = None,
    ) -> None:
        super().__init__(config=config)
        self.model = model
        self.documents = documents or PackedDocuments()
        self.ep_group, self.tp_group = groups.ep, groups.tp
        self.sequence_parallel = config.sequence_parallel
        # The processes that share the tokens of a sequence; SequenceSplit counts on their order.
        assert groups.tp_cp.rank() == groups.cp.rank() * groups.tp.size() + groups.tp.rank()
        self.sequence_group = groups.tp_cp if config.sequence_parallel else groups.cp
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        place = {"dtype": config.params_dtype, "device": device}
        self.phi = torch.nn.Parameter(
            torch.empty(model.hidden_size, model.num_experts, model.slots_per_expert, **place)
        )
        self.scale = torch.nn.Parameter(torch.empty(1, **place))
        for parameter in (self.phi, self.scale):
            # Their gradients come from a process's own tokens. megatron-core sums those of parameters with this mark
            # over tensor-parallel processes; over context-parallel ones it sums all.
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
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
        """[T, B, d] to ([T, B, d], no bias); T are this process's tokens."""
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
        slots, routing = self._dispatch(x)
        batch, blocks, experts, per_expert, width = slots.shape
        by_expert = slots.permute(2, 0, 1, 3, 4).reshape(experts, -1, width)
        # In mode sequence all processes that share a sequence have the same slots.
        rows = self._rows("common" if self.model.routing_mode == "sequence" else "own")
        results = self._run_experts(by_expert, rows).reshape(experts, batch, blocks, per_expert, width)
        return combine(results.permute(1, 2, 0, 3, 4), routing)

    def _dispatch(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        mix = self.model.routing_mix
        block_length = self.model.block_length if self.model.routing_mode == "block_causal" else None
        if self.documents.segment_starts is not None:
            return dispatch_blocks(x, self.phi, self.scale, mix, self.documents.block_plan(block_length, self.ep_group))
        if self.sequence_group.size() == 1:
            return dispatch_blocks(x, self.phi, self.scale, mix, block_plan(x.size(1), block_length, x.device))
        plan = local_plan_of_one_document(
            self._split(x.size(1)),
            self.sequence_group.rank(),
            block_length,
            # Where slots are exchanged, all processes send equally many.
            equal_blocks=self.sequence_parallel or self.ep_group.size() > 1,
            device=x.device,
        )
        return dispatch_split(x, self.phi, self.scale, mix, plan, self.sequence_group)

    def _token(self, x: torch.Tensor) -> torch.Tensor:
        """Every token through every expert: E times the work of one."""
        experts = self.model.num_experts
        mixed = mixed_tokens(x, self.model.routing_mix).reshape(1, -1, x.size(-1))
        if self.ep_group.size() > 1:
            mixed = mixed.expand(experts, -1, -1)
        results = self._run_experts(mixed, self._rows("own"))
        by_expert = expert_weights(x, self.phi, self.scale)
        return torch.einsum("bte,ebtd->btd", by_expert.to(x.dtype), results.reshape(experts, *x.shape))

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        """One expert per segment, merged by the routing of the segment before (Lory, arXiv 2405.03133)."""
        batch, length, width = x.shape
        mix = self.model.routing_mix
        if self.documents.segment_starts is not None:
            return self._merged_documents(x)
        if self.sequence_group.size() == 1:
            block = min(self.model.block_length, length)
            shares = merge_weights(x, self.phi, self.scale, mix=mix, block_length=block)
        else:
            block, split = self.model.block_length, self._split(length)
            shares = merge_weights_split(
                x, self.phi, self.scale, mix=mix, block_length=block, split=split, group=self.sequence_group
            )
        segments = shares.size(1)
        padded = F.pad(x, (0, 0, 0, segments * block - length)).reshape(batch * segments, block, width)
        y = self._run_merged(padded, shares.flatten(0, 1))
        return y.reshape(batch, segments * block, width)[:, :length]

    def _merged_documents(self, x: torch.Tensor) -> torch.Tensor:
        """The same where sequences hold several documents: segments begin anew with each."""
        plan = self.documents.segment_plan(self.model.block_length)
        shares = merge_weights_of_documents(x, self.phi, self.scale, self.model.routing_mix, plan)
        results = self.experts.forward_merged(plan.to_segments(x), shares, equal_segments=False)
        return plan.from_segments(results)

    def _run_merged(self, segments: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        if not self.sequence_parallel:
            return self.experts.forward_merged(segments, shares)
        everyones = gather_copies(segments, self.tp_group), gather_copies(shares, self.tp_group)
        return own_part(self.experts.forward_merged(*everyones), self.tp_group)

    def _run_experts(self, slots: torch.Tensor, rows: Rows) -> torch.Tensor:
        return slots_from_experts(self.experts(slots_to_experts(slots, self.ep_group), rows), self.ep_group)

    def _rows(self, shared: Rows) -> Rows:
        """How the slots of tensor-parallel processes belong together: ``shared`` where these share sequences."""
        return shared if self.sequence_parallel else "copied"

    def _split(self, own_tokens: int) -> SequenceSplit:
        tensor_size = self.tp_group.size() if self.sequence_parallel else 1
        ranks = self.sequence_group.size()
        return SequenceSplit(own_tokens * ranks, ranks // tensor_size, tensor_size)
