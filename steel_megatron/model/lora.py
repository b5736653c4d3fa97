"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + alpha / rank * B A x, where only A and B are trained.

Every matrix that is published under a name of its own has adapters of its own, as peft would give it: queries, keys and
values, the gate and the value of an expert. Legend: r rank, d hidden size, G groups of q queries of size h, E experts,
m matrices of a way through an expert, N vectors of each, M segments.

Over tensor-parallel processes, B is cut with the rows of W and A is on all of them, or A is cut with W's columns and B
is on all. What is sent between them has r numbers where W's input or output has d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from steel_megatron.config import LoraConfig, ModelConfig
from steel_megatron.model.dropout import ADAPTER_OF_OUTPUT, ADAPTER_OF_QKV, Dropout
from steel_megatron.parallel.collectives import gather_parts, sum_gradients

A, B = "lora_A", "lora_B"


def adapter_names(name: str) -> tuple[str, str]:
    """What A and B of a weight are called in checkpoints.

    Args:
        name: the weight's.
    """
    prefix = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return prefix + A, prefix + B


def is_adapter(name: str) -> bool:
    """Whether a weight, or what an optimizer keeps of it, is an adapter's, by its name."""
    return name.endswith((A, B))


@dataclass(eq=False)
class Adapters:
    """What the adapters of a process share.

    Attributes:
        settings: of the run.
        dropout: of the run.
        enabled: whether they add something; without, the model is the one that was adapted.
    """

    settings: LoraConfig
    dropout: Dropout
    enabled: bool = True

    @property
    def rank(self) -> int:
        """r."""
        assert self.settings.rank is not None
        return self.settings.rank

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.settings.alpha / self.rank

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute the model that was adapted for a while."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


def add_adapters(stage: GPTModel, adapters: Adapters) -> None:
    """Give a part of the model adapters, and freeze all other weights.

    Args:
        stage: the part.
        adapters: shared by all parts of a process.
    """
    targets = adapters.settings.targets
    for layer in stage.decoder.layers:
        attention = layer.self_attention
        for name, kind in (("linear_qkv", AdaptedQkv), ("linear_proj", AdaptedProjection)):
            if name in targets:
                linear = getattr(attention, name)
                linear.__class__ = kind
                linear.add_adapters(adapters, layer.layer_number)
        for module in layer.mlp.modules():
            if hasattr(module, "add_expert_adapters"):
                module.add_expert_adapters(adapters, [name for name in ("linear_fc1", "linear_fc2") if name in targets])
    for name, weight in stage.named_parameters():
        weight.requires_grad_(is_adapter(name))
    if stage.pre_process:
        # Layers that are computed again in the backward pass need an input with a gradient.
        stage.embedding.register_forward_hook(lambda _module, _inputs, output: _Begin.apply(output, _anchor(output)))


def _anchor(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())


class _Begin(torch.autograd.Function):
    """A tensor of frozen weights as one that takes gradients, which end here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """``x`` unchanged.

        Args:
            ctx: autograd's context.
            x: any tensor.
            anchor: one that requires a gradient, and gets none.
        """
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        return None, None


def new_factor(like: torch.Tensor, shape: Sequence[int], split_dim: int | None) -> torch.nn.Parameter:
    """An adapter's A or B, uninitialised.

    Args:
        like: the weight that it adapts, for type and device.
        shape: of this process's part.
        split_dim: the axis that is cut over tensor-parallel processes; None if each has all of it.
    """
    factor = torch.nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))
    setattr(factor, "allreduce", getattr(like, "allreduce", True))  # noqa: B010
    if split_dim is not None:
        set_tensor_model_parallel_attributes(factor, is_parallel=True, dim=split_dim, stride=1)
    return factor


class AdaptedQkv(ColumnParallelLinear):
    """The projections to queries, keys and values: A [3, r, d], and B [rows, r] with the rows of the weight's."""

    def add_adapters(self, adapters: Adapters, layer: int) -> None:
        """Become one with adapters.

        Args:
            adapters: shared.
            layer: number of the layer, from 1.
        """
        self.adapters, self.layer = adapters, layer
        self.lora_A = new_factor(self.weight, (3, adapters.rank, self.input_size), None)
        self.lora_B = new_factor(self.weight, (self.weight.size(0), adapters.rank), 0)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, B, d] to [T, B, rows], by group: its queries, its key, its value."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.adapters.enabled:
            return output, bias
        own, group = self.adapters, self.tp_group
        if self.training and own.settings.dropout:
            input_ = own.dropout.drop_input(input_, self.layer, ADAPTER_OF_QKV)
        a = sum_gradients(self.lora_A, group) if self.sequence_parallel else self.lora_A
        inner = torch.nn.functional.linear(input_, a.flatten(0, 1))
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=group)
        else:
            inner = sum_gradients(inner, group)
        queries = self.config.num_attention_heads // self.config.num_query_groups
        by_kind = zip(inner.chunk(3, dim=-1), split_rows(self.lora_B, queries, self.config.kv_channels), strict=True)
        added = [torch.einsum("tbr,gnr->tbgn", of_kind, b) for of_kind, b in by_kind]
        return output + own.scale * torch.cat(added, dim=-1).flatten(2), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's, with the rows of B cut like those of the weight.

        Args:
            prefix, sharded_offsets, metadata: megatron-core's.
        """
        return _sharded(self, prefix, {"weight": 0, "bias": 0, B: 0}, sharded_offsets, metadata)


def split_rows(rows: torch.Tensor, queries: int, size: int) -> list[torch.Tensor]:
    """Rows [G (q + 2) h, ...] of queries, keys and values to [G, q h, ...], [G, h, ...] and [G, h, ...].

    Args:
        rows: of some or all groups.
        queries: q.
        size: h.
    """
    return list(rows.unflatten(0, (-1, (queries + 2) * size)).split([queries * size, size, size], dim=1))


class AdaptedProjection(RowParallelLinear):
    """The projection after attention: A [r, columns], and B [d, r]."""

    def add_adapters(self, adapters: Adapters, layer: int) -> None:
        """Become one with adapters.

        Args: as for :meth:`AdaptedQkv.add_adapters`.
        """
        self.adapters, self.layer = adapters, layer
        self.lora_A = new_factor(self.weight, (adapters.rank, self.weight.size(1)), 1)
        self.lora_B = new_factor(self.weight, (self.weight.size(0), adapters.rank), None)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, B, columns] to [T, B, d], under sequence parallelism of this process's tokens."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.adapters.enabled:
            return output, bias
        own, group = self.adapters, self.tp_group
        if self.training and own.settings.dropout:
            first = group.rank() * input_.size(-1)
            input_ = own.dropout.drop_input(input_, self.layer, ADAPTER_OF_OUTPUT, first_column=first, whole=True)
        inner = torch.nn.functional.linear(input_, self.lora_A)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group)
        b = sum_gradients(self.lora_B, group) if self.sequence_parallel else self.lora_B
        return output + own.scale * torch.nn.functional.linear(inner, b), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's, with the columns of A cut like those of the weight.

        Args:
            prefix, sharded_offsets, metadata: megatron-core's.
        """
        return _sharded(self, prefix, {"weight": 1, A: 1}, sharded_offsets, metadata)


def _sharded(
    module: Any, prefix: str, axes: dict[str, int], sharded_offsets: Any, metadata: Any
) -> dict[str, ShardedTensor]:
    sharded: dict[str, ShardedTensor] = make_sharded_tensors_for_checkpoint(
        {name: weight for name, weight in module.named_parameters(recurse=False)},
        prefix,
        axes,
        sharded_offsets,
        tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return sharded


class Factors(NamedTuple):
    """The adapters on one way through some experts: A [E, m, r, in], B [E, m, out, r], and their factor."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [E, N, m out] and what the adapters make of x [E, N, in]."""
        inner = torch.einsum("eni,emri->emnr", x, self.a)
        return y + self.scale * torch.einsum("emnr,emor->enmo", inner, self.b).flatten(2)

    def add_merged_to(
        self, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ep_group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """The same where a segment's matrix is a weighted sum of the experts', and so is its low-rank term.

        Args:
            y: [M, N, m out].
            x: [M, N, in].
            weights: [M, E], of all experts.
            ep_group: processes that share the experts; None where each has all.
        """
        a, b = ((part if ep_group is None else gather_parts(part, ep_group).flatten(0, 1)) for part in self[:2])
        inner = torch.einsum("sni,emri->snemr", x, a) * weights.to(x.dtype)[:, None, :, None, None]
        return y + self.scale * torch.einsum("snemr,emor->snmo", inner, b).flatten(2)


def delta_of(name: str, a: torch.Tensor, b: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """B A of a layer, in float32 and in the shape of its weight; not multiplied by alpha / rank.

    Args:
        name: the weight's, in a checkpoint.
        a: [3, r, d] of queries, keys and values, else [..., r, in].
        b: [rows, r], else [..., out, r].
        model: the settings.
    """
    a, b = a.float(), b.float()
    if not name.endswith("linear_qkv.weight"):
        return b @ a
    by_kind = zip(split_rows(b, model.num_attention_heads // model.query_groups, model.head_dim), a, strict=True)
    return torch.cat([rows @ own for rows, own in by_kind], dim=1).flatten(0, 1)


def initial_bound(name: str, shape: Sequence[int]) -> float:
    """Initial values lie in (-bound, bound), as peft has them: those of A depend on its input, B is 0."""
    return 1 / math.sqrt(shape[-1]) if name.endswith(A) else 0.0
