"""The attention parts for megatron-core's slots: scaled dot products by torch, rotary embedding in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32 whatever the type of its input.

    megatron-core's own wrapper refuses sequence parallelism; this one marks its weight, so that the weight's
    gradient is summed over the processes that share the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # megatron-core reads the mark when it reduces gradients.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d], in the type of ``x``."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Float32(torch.nn.Module):
    """Casts to float32.

    Stands in the slots of the query and key norms, which megatron-core calls just before the rotary embedding:
    so the rotation is computed in float32 inside bfloat16 training (Steel-LLM, section 4).
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same values in float32."""
        return x.float()


class ScaledDotProductAttention(MegatronModule):
    """Causal attention by torch's fused kernel; megatron-core's own stores all scores.

    Takes the arguments of megatron-core's ``core_attention`` slot.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

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
        """[T, B, heads, size] and [T, B, groups, size] to [T, B, heads * size], in the type of ``value``."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        assert attn_mask_type in (None, AttnMaskType.causal)
        # The rotated queries and keys come in float32.
        q, k, v = (tensor.to(value.dtype).permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)
