"""The Soft-MoE layer, for the ``mlp`` slot of megatron-core's TransformerLayer.

Notation: B sequences of T tokens, hidden size d, E experts with P slots each. How tokens reach experts is the mode's
(:mod:`steel_megatron.model.routing`); here modes meet experts that are cut over processes, and sequences that are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from steel_megatron.config import ModelConfig
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.experts import Experts, TokenLayout
from steel_megatron.model.recompute import recomputed
from steel_megatron.model.routing import OldNames, RoutedLayer, SharedSequences, routing_mode
from steel_megatron.parallel.collectives import (
    gather_copies,
    gather_parts,
    own_part,
    slots_from_experts,
    slots_to_experts,
)
from steel_megatron.parallel.sequence import SequenceSplit


def slot_exchange_group(groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The processes that bring slots of their own to the same experts: tensor-parallel ones share theirs, unless
    experts are cut over other processes than the rest of the model."""
    return groups.ep if groups.expt_tp.size() == groups.tp.size() else groups.tp_ep


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
        self,
        config: TransformerConfig,
        *,
        inner_size: int,
        model: ModelConfig,
        groups: ProcessGroupCollection,
        **unused: Any,
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
        self.layout: TokenLayout = "sharded" if config.sequence_parallel else "replicated"

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """[T, B, d] to ([T, B, d], no bias); T are this process's tokens."""
        flat = hidden_states.reshape(1, -1, hidden_states.size(-1))
        return self.network(flat, self.layout).reshape(hidden_states.shape), None


class ParallelSoftMoE(OldNames, MegatronModule):
    """Soft mixture of experts (Soft MoE, arXiv 2308.00951, section 2; Steel-LLM, section 3.1).

    Where processes share sequences, each routes its own tokens. In modes ``sequence`` and ``block_causal`` only slots
    travel. In ``token`` and ``merged`` and for the shared expert, every token passes through experts: under sequence
    parallelism tokens are sent to them as to any dense layer, under context parallelism they stay.

    Args:
        config: megatron-core's configuration.
        model: the model's settings: experts, slots, routing mode.
        groups: the process groups.
        documents: which documents the sequences hold.
        recompute_routing: whether the backward pass makes slots and combine weights again
            (:mod:`steel_megatron.model.recompute`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        groups: ProcessGroupCollection,
        documents: PackedDocuments | None = None,
        recompute_routing: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert model.routing_mode is not None, "checked by ModelConfig"
        self.mode = routing_mode(model.routing_mode)
        self.slot_input, self.block_length = model.slot_input, model.block_length
        self.num_experts = model.num_experts
        self.recompute_routing = recompute_routing
        self.exchange_group = slot_exchange_group(groups)
        self.documents = documents or PackedDocuments(self.exchange_group)
        self.ep_group, self.tp_group = groups.ep, groups.tp
        # Whether the experts' matrices are cut over other processes than those of the rest of the model.
        self.folded = groups.expt_tp.size() != groups.tp.size()
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
        self.routing_scale_init = model.routing_scale_init
        if config.perform_initialization:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the routing's own parameters; experts have theirs."""
        torch.nn.init.normal_(self.phi, std=self.config.init_method_std)
        torch.nn.init.constant_(self.scale, self.routing_scale_init)

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """[T, B, d] to ([T, B, d], no bias); T are this process's tokens."""
        x = hidden_states.transpose(0, 1)
        shared = self._shared_sequences(x.size(1)) if self.sequence_group.size() > 1 else None
        if self.recompute_routing and torch.is_grad_enabled():
            y = recomputed(self._route, self, x, shared)
        else:
            y = self._route(self, x, shared)
        output = y.transpose(0, 1).contiguous()  # pipeline stages send it as it lies in memory
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)[0]
        return output, None

    def _route(self, layer: RoutedLayer, x: torch.Tensor, shared: SharedSequences | None) -> torch.Tensor:
        """What the mode computes of this process's tokens [B, L, d], with this layer or one that stands for it."""
        if self.documents.document_starts is None:
            return self.mode.forward(layer, x) if shared is None else self.mode.forward_split(layer, x, shared)
        if shared is None:
            return self.mode.forward_documents(layer, x, self.documents)
        return self.mode.forward_split_documents(layer, x, shared, self.documents)

    def _shared_sequences(self, own_tokens: int) -> SharedSequences:
        ranks, tensor_size = self.sequence_group.size(), self.tp_group.size() if self.sequence_parallel else 1
        return SharedSequences(
            SequenceSplit(own_tokens * ranks, ranks // tensor_size, tensor_size),
            self.sequence_group.rank(),
            partial(gather_parts, group=self.sequence_group),
            # Where slots are exchanged, all processes send equally many.
            equal_blocks=self.sequence_parallel or self.exchange_group.size() > 1,
        )

    def run_experts(self, vectors: torch.Tensor, *, replicated: bool = False) -> torch.Tensor:
        """Every expert on its own vectors: see :class:`steel_megatron.model.routing.RoutedLayer`."""
        if self.ep_group.size() > 1:
            vectors = vectors.expand(self.num_experts, -1, -1)
        if self.folded and (replicated or not self.sequence_parallel):
            return self._run_part(vectors)
        sharded: TokenLayout = "partial_gradients" if replicated else "sharded"
        return self._send(vectors, sharded if self.sequence_parallel or self.folded else "replicated")

    def _send(self, vectors: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return slots_from_experts(self.experts(slots_to_experts(vectors, self.ep_group), layout), self.ep_group)

    def _run_part(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [E or 1, N, d] that all tensor-parallel processes have: each sends its part, and gets all results."""
        count, size = vectors.size(1), self.tp_group.size()
        rows = F.pad(vectors, (0, 0, 0, -count % size)).transpose(0, 1)
        if self.sequence_parallel:  # results are used each for its own tokens: their gradients are partial
            results = self._send(rows.chunk(size)[self.tp_group.rank()].transpose(0, 1), "sharded")
            everyones = gather_parts(results.transpose(0, 1).contiguous(), self.tp_group).flatten(0, 1)
        else:
            results = self._send(own_part(rows.contiguous(), self.tp_group).transpose(0, 1), "sharded")
            everyones = gather_copies(results.transpose(0, 1).contiguous(), self.tp_group)
        return everyones[:count].transpose(0, 1)

    def run_merged_experts(
        self, segments: torch.Tensor, weights: torch.Tensor, *, equal_segments: bool = True
    ) -> torch.Tensor:
        """Each segment through its merged expert, wherever the experts are.

        Args: as for :meth:`steel_megatron.model.routing.RoutedLayer.run_merged_experts`.
        """
        if not self.folded or self.sequence_parallel or self.tp_group.size() == 1:
            return self._merge_of_processes(segments, weights, equal_segments)
        # Tensor-parallel processes have the same segments: each computes its part.
        count, size = segments.size(0), self.tp_group.size()
        missing = -count % size
        own = own_part(F.pad(segments, (0, 0, 0, 0, 0, missing)), self.tp_group)
        results = self._merge_of_processes(
            own, own_part(F.pad(weights, (0, 0, 0, missing)), self.tp_group), equal_segments
        )
        return gather_copies(results, self.tp_group)[:count]

    def _merge_of_processes(self, segments: torch.Tensor, weights: torch.Tensor, equal_segments: bool) -> torch.Tensor:
        """Segments of this process's own, or without sequence parallelism of all that share the experts' matrices."""
        group = self.experts.tp_group
        if group.size() == 1 or not (self.sequence_parallel or self.folded):
            return self.experts(segments, shares=weights, equal_segments=equal_segments)
        count, length = segments.shape[:2]
        if self.folded and not equal_segments:  # of other documents: the smaller ones are filled up
            most = torch.tensor([count, length], device=segments.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
            missing = int(most[0]) - count
            segments = F.pad(segments, (0, 0, 0, int(most[1]) - length, 0, missing))
            weights = F.pad(weights, (0, 0, 0, missing))
        everyones, shares = gather_copies(segments, group), gather_copies(weights, group)
        results = self.experts(everyones, shares=shares, equal_segments=equal_segments)
        return own_part(results, group)[:count, :length]
