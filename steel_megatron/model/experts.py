"""Feed-forward networks: E of them side by side, computed as two batched matrix products.

Steel-LLM's expert ("double SwiGLU", section 3.2) gates the way down as well as the way up:

    h = silu(W_gate_up x) * (W_up x)        y = silu(W_gate_down h) * (W_down h)

SwiGLU has the plain way down, y = W_down h. A dense feed-forward layer is the same with E = 1. Legend: E local
experts, N vectors per expert, I inner width of one expert, d hidden size; no biases.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from steel_megatron.config import Activation
from steel_megatron.model.lora import A, Adapters, B, Factors, new_factor
from steel_megatron.model.routing.merging import CHUNK_BYTES, merged_linear, sums_are_sent, swiglu
from steel_megatron.parallel.collectives import gather_rows, scatter_sums, sum_both_ways, sum_gradients

TokenLayout = Literal["replicated", "sharded", "partial_gradients"]
"""Layout of an expert's inputs over the tensor-parallel processes that share the expert.

``replicated``: the same vectors and the same gradients of the results (no sequence parallelism).
``sharded``: each process has its own vectors (sequence parallelism). They are gathered before the expert, and the
results are reduce-scattered.
``partial_gradients``: the same vectors, but each process uses the results only for its own tokens. Nothing is gathered;
the results and their gradients are summed.
"""


class Experts(MegatronModule):
    """E feed-forward networks, each split over tensor-parallel processes; expert-parallel processes share them.

    Args:
        config: megatron-core's configuration; gives type and device of the weights.
        num_experts: experts over all processes.
        inner_size: I, over all tensor-parallel processes.
        activation: what each computes.
        groups: the process groups; experts are shared over ``groups.ep`` and their matrices cut over
            ``groups.expt_tp`` if ``expert_parallel``.
        expert_parallel: whether the experts are split over the expert-parallel groups; else each process has all of
            them, cut over ``groups.tp``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_experts: int,
        inner_size: int,
        activation: Activation,
        groups: ProcessGroupCollection,
        expert_parallel: bool,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.expt_tp if expert_parallel else groups.tp
        self.ep_group = groups.ep if expert_parallel and dist.get_world_size(groups.ep) > 1 else None
        # Whether other processes hold copies of these weights than of the other ones.
        self.apart = self.ep_group is not None or self.tp_group.size() != groups.tp.size()
        self.copies_group = groups.expt_dp if self.apart else groups.dp_cp
        self.gated_down = activation == "double_swiglu"
        self.local_experts = num_experts // (1 if self.ep_group is None else self.ep_group.size())
        hidden, local_inner = config.hidden_size, inner_size // self.tp_group.size()
        # The middle dimension counts matrices: (gate, up) on the way up; (gate, down) or (down) on the way down.
        self.up = self._weight(self.local_experts, 2, local_inner, hidden, split_dim=2)
        self.down = self._weight(self.local_experts, 2 if self.gated_down else 1, hidden, local_inner, split_dim=3)
        self.adapters: Adapters | None = None
        if config.perform_initialization:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with the configuration's ``init_method_std``.

        Every process draws all experts whole and keeps its part, so those with equal random states make one layer.
        """
        expert_parallel = (0, 1) if self.ep_group is None else (self.ep_group.rank(), self.ep_group.size())
        with torch.no_grad():
            for weight, split_dim in ((self.up, 2), (self.down, 3)):
                cuts = {0: expert_parallel, split_dim: (self.tp_group.rank(), self.tp_group.size())}
                shape = [size * cuts.get(dim, (0, 1))[1] for dim, size in enumerate(weight.shape)]
                own = weight.new_empty(shape).normal_(0.0, self.config.init_method_std)
                for dim, (rank, _) in cuts.items():
                    own = own.narrow(dim, rank * weight.size(dim), weight.size(dim))
                weight.copy_(own)

    def _weight(self, *shape: int, split_dim: int) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dim, stride=1)
        # megatron-core reduces the gradients of such parameters over the processes that hold copies of the expert.
        setattr(weight, "allreduce", not self.apart)  # noqa: B010
        return weight

    def add_expert_adapters(self, adapters: Adapters, targets: Collection[str]) -> None:
        """Give every expert low-rank adapters of its own.

        Args:
            adapters: shared.
            targets: ``linear_fc1`` for the way up, ``linear_fc2`` for the way down.
        """
        self.adapters = adapters
        for name, target, split in (("up", "linear_fc1", B), ("down", "linear_fc2", A)):
            if target not in targets:
                continue
            weight = getattr(self, name)
            *front, rows, columns = weight.shape
            for part, shape in ((A, (*front, adapters.rank, columns)), (B, (*front, rows, adapters.rank))):
                factor = new_factor(weight, shape, (2 if part == B else 3) if part == split else None)
                if part != split:
                    # Copies: the gradient norm counts that of the first process, whatever the model's own groups are.
                    vars(factor).update(tensor_model_parallel=True, shared=self.tp_group.rank() > 0)
                setattr(self, f"{name}_{part}", factor)

    def _factors(self, name: str) -> Factors | None:
        """The adapters of a way through the experts; those that all tensor-parallel processes have get partial
        gradients, like vectors before matrices that are cut."""
        if self.adapters is None or not self.adapters.enabled or not hasattr(self, f"{name}_{A}"):
            return None
        a, b = getattr(self, f"{name}_{A}"), getattr(self, f"{name}_{B}")
        if name == "up":
            return Factors(sum_gradients(a, self.tp_group), b, self.adapters.scale)
        return Factors(a, sum_gradients(b, self.tp_group), self.adapters.scale)

    def forward(
        self,
        x: torch.Tensor,
        layout: TokenLayout = "replicated",
        shares: torch.Tensor | None = None,
        equal_segments: bool = True,
    ) -> torch.Tensor:
        """Every expert on its own vectors, or all merged by given shares into one: :func:`merged_experts`.

        Both are called as a module: what gathers the weights before they are used hooks there.

        Args:
            x: [E, N, d], or [1, N, d] where all experts get the same vectors; for merged experts [M, N, d], M segments
                of N tokens.
            layout: of the vectors over the tensor-parallel processes, which share each expert; not of merged ones.
            shares: [M, experts over all processes] in float32 or wider; None merges none.
            equal_segments: whether M is surely the same on all expert-parallel processes.

        Returns:
            [E, N, d], or [M, N, d]
        """
        if shares is None:
            return self._compute(x, self.up, self.down, layout)
        groups = {"tp_group": self.tp_group, "ep_group": self.ep_group}
        adapters = self._factors("up"), self._factors("down")
        return merged_experts(x, shares, self.up, self.down, adapters=adapters, equal_segments=equal_segments, **groups)

    def _compute(self, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        x = self._enter(x, layout).expand(up.size(0), -1, -1)
        inner = swiglu(_with(self._factors("up"), torch.bmm(x, up.flatten(1, 2).mT), x))
        # The gate of the way down is not linear, so both products are summed over processes before it.
        out = self._leave(_with(self._factors("down"), torch.bmm(inner, down.flatten(1, 2).mT), inner), layout)
        return swiglu(out) if self.gated_down else out

    def _enter(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Vectors before matrices that are cut over the tensor-parallel processes."""
        if self.tp_group.size() == 1 or layout == "partial_gradients":
            return x
        return gather_rows(x, self.tp_group) if layout == "sharded" else sum_gradients(x, self.tp_group)

    def _leave(self, partial: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The sums over the tensor-parallel processes, of the vectors that :meth:`_enter` was given."""
        if self.tp_group.size() == 1:
            return partial
        if layout == "replicated":
            return reduce_from_tensor_model_parallel_region(partial, self.tp_group)
        return (scatter_sums if layout == "sharded" else sum_both_ways)(partial, self.tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """The weights for megatron-core's checkpoints: cut by expert and by inner width.

        Args:
            prefix: of the weights' names, with its dot.
            sharded_offsets: (axis, index of this part, number of parts) of each axis in front of a weight's own, such
                as the layers'.
            metadata: megatron-core's; not used.

        Returns:
            The weights by name, prefix included.
        """
        axis = len(sharded_offsets)
        tensor_parallel = (self.tp_group.rank(), self.tp_group.size())
        sharded = {}
        split_dims = {"up": 2, f"up_{B}": 2, "down": 3, f"down_{A}": 3}
        for name, weight in self.named_parameters():
            split_dim, offsets = split_dims.get(name), [*sharded_offsets]
            if split_dim is not None:
                offsets.append((axis + split_dim, *tensor_parallel))
            if self.ep_group is not None:
                offsets.append((axis, self.ep_group.rank(), self.ep_group.size()))
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                weight,
                *offsets,
                replica_id=(0, 0 if split_dim else tensor_parallel[0], dist.get_rank(self.copies_group)),
                prepend_axis_num=axis,
            )
        return sharded


def _with(factors: Factors | None, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if factors is None else factors.add_to(y, x)


def merged_experts(
    x: torch.Tensor,
    shares: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    ep_group: dist.ProcessGroup | None,
    adapters: tuple[Factors | None, Factors | None] = (None, None),
    equal_segments: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Merge all experts by given shares and compute the merged expert, segment by segment.

    Under expert parallelism each process has segments of its own and one of R parts of the experts. What is sent is the
    smaller of the two, in numbers that a process sends, forward:

        all experts, to every process               (R - 1) / R * E * n
        every process's sums over its own experts   (R - 1) * M * n, and (R - 1) / R * M * E for the shares

    Backward: the matrices once more, and as many numbers for gradients (the experts' in float32). So experts are
    sent unless the processes have fewer segments in total than there are experts.

    Args:
        x: [M, N, d] tokens, the same on all processes of ``tp_group``.
        shares: [M, E] in float32 or wider, of experts over all processes.
        up: [E / R, 2, I, d] gate and value, I the inner width on this process.
        down: [E / R, 2, d, I] gate and value (double SwiGLU), or [E / R, 1, d, I] (SwiGLU).
        tp_group: the processes that share the inner width.
        ep_group: the processes that share the experts; None where each has all of them.
        adapters: of ``up`` and ``down``; merged like these, without making their products.
        equal_segments: whether all processes of ``ep_group`` surely have the same number of segments. If not, experts
            are sent: that needs no agreement about chunks.
        chunk_bytes: bound of the memory for merged matrices.

    Returns:
        [M, N, d]
    """
    # Each tensor-parallel process sees its own part of the matrices: the gradients of tokens and shares add up.
    x = sum_gradients(x, tp_group)
    weights = sum_gradients(shares, tp_group)
    shares = weights.unsqueeze(0)
    ranks = 1 if ep_group is None else ep_group.size()
    if equal_segments and sums_are_sent(x.size(0), shares.size(2), ranks):
        # Every process gets the shares of its own experts in all processes' segments: [R source, M, E / R].
        by_holder = shares.reshape(x.size(0), ranks, -1).transpose(0, 1).contiguous()
        shares = all_to_all(ep_group, by_holder)
    of_up, of_down = adapters
    inner = merged_linear(x, shares, up.flatten(1, 2), ep_group, chunk_bytes)
    inner = swiglu(inner if of_up is None else of_up.add_merged_to(inner, x, weights, ep_group))
    out = merged_linear(inner, shares, down.flatten(1, 2), ep_group, chunk_bytes)
    out = out if of_down is None else of_down.add_merged_to(out, inner, weights, ep_group)
    # The gate of the way down is not linear, so both products are summed over processes before it.
    out = reduce_from_tensor_model_parallel_region(out, tp_group)
    return out if down.size(1) == 1 else swiglu(out)
