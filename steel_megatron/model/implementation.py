"""The modules of a transformer layer in each implementation, under one set of names in checkpoints.

transformer-engine computes a norm and the linear layer after it in one module, which holds the norm's weight as
``layer_norm_weight``. A checkpoint keeps it under the name that it has where the norm is a module of its own, so each
implementation loads what another one saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp

from steel_megatron.model.attention import RMSNorm, ScaledDotProductAttention
from steel_megatron.platform.implementation import Implementation

FUSED_NAMES = {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}
"""Beginnings of names in a layer of transformer-engine's modules, and what checkpoints call them."""

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits [B, T, V / TP] in float32 and labels [B, T] to losses [B, T] in nats, float32."""


@dataclass(frozen=True)
class LayerParts:
    """Modules for megatron-core's slots.

    Attributes:
        input_norm: before the projections to queries, keys and values; nothing where these compute it.
        linear_qkv: these projections.
        attention: for the ``core_attention`` slot.
        linear_proj: the projection after it.
        norm: before the feed-forward layer, and after the last layer.
        names: beginnings of weights' names in a layer, and what checkpoints call them instead.
    """

    input_norm: type
    linear_qkv: type
    attention: type
    linear_proj: type
    norm: type
    names: Mapping[str, str] = field(default_factory=dict)


def layer_parts(chosen: Implementation) -> LayerParts:
    """The modules of an implementation."""
    if chosen.transformer_engine is None:
        norm = ApexRMSNorm if chosen.apex_norm else RMSNorm
        return LayerParts(norm, ColumnParallelLinear, ScaledDotProductAttention, RowParallelLinear, norm)
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    provider = TESpecProvider()
    fused = provider.column_parallel_layer_norm_linear()
    assert fused is not None
    norm = provider.layer_norm(rms_norm=True)
    return LayerParts(IdentityOp, fused, FusedAttention, provider.row_parallel_linear(), norm, FUSED_NAMES)


def implementation_fields(chosen: Implementation) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that switch its fusions on or off."""
    return {
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": chosen.transformer_engine is not None,
        "gradient_accumulation_fusion": chosen.fused_gradients,
    }


def cross_entropy(chosen: Implementation, tp_group: torch.distributed.ProcessGroup) -> CrossEntropy:
    """Cross entropy of every position over a vocabulary that is cut over a group.

    Args:
        chosen: the implementation.
        tp_group: processes that share the vocabulary.
    """
    if chosen.transformer_engine is None:
        return vocab_parallel_cross_entropy
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    # Some versions write the gradient over the logits, which nobody reads again.
    return partial(te_parallel_cross_entropy, tp_group=tp_group)


class ApexRMSNorm(RMSNorm):
    """The same norm in one kernel of apex, which computes in float32 as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        self._kernel = fused_rms_norm_affine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d], in the type of ``x``."""
        normed: torch.Tensor = self._kernel(x, self.weight.to(x.dtype), self.weight.shape, self.eps)
        return normed


class FusedAttention(ScaledDotProductAttention):
    """transformer-engine's attention, under context parallelism as well.

    Packed documents, dropped weights and float32 are computed as in the local implementation: its kernels take no such
    masks, would drop other weights on every layout, and have no float32.
    """

    def __init__(self, config: TransformerConfig, documents: Any = None, dropout: Any = None, **kwargs: Any) -> None:
        super().__init__(config, documents=documents, dropout=dropout, **kwargs)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.fused = TEDotProductAttention(config, **{**kwargs, "attention_dropout": 0.0})

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Causal attention.

        Args: as for :meth:`ScaledDotProductAttention.forward`.
        """
        drops = self.training and self.dropout is not None and self.dropout.attention
        if drops or self.documents.document_starts is not None or value.dtype == torch.float32:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotated in float32
        attended: torch.Tensor = self.fused(query, key, value, None, AttnMaskType.causal)
        return attended
