"""The attention parts for megatron-core's slots: scaled dot products by torch, rotary embedding in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.dropout import Dropout
from steel_megatron.parallel.collectives import gather_parts
from steel_megatron.parallel.sequence import SequenceSplit


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32 whatever the type of its input.

    megatron-core's own wrapper refuses sequence parallelism; this one marks its weight, so that the weight's
    gradient is summed over the processes that share the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        # megatron-core reads the mark when it reduces gradients.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All ones."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d], in the type of ``x``."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Float32RotaryAttention(SelfAttention):
    """megatron-core's attention with queries and keys in float32 between projection and rotation.

    So the rotation is computed in float32 inside bfloat16 training (Steel-LLM, section 4).
    """

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """What megatron-core returns, the first two in float32."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return query.float(), key.float(), *others


class ScaledDotProductAttention(MegatronModule):
    """Causal attention by torch's fused kernel; megatron-core's own stores all scores.

    Takes the arguments of megatron-core's ``core_attention`` slot. Under context parallelism keys and values of whole
    sequences are gathered (their gradients are reduce-scattered): each piece of queries attends to the keys up to its
    own end, so every process computes the same number of scores. Where weights are dropped, all scores are stored.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        documents: PackedDocuments | None = None,
        dropout: Dropout | None = None,
        layer_number: int = 1,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.documents = documents or PackedDocuments()
        self.dropout, self.layer_number = dropout, layer_number
        self.softmax_scale = softmax_scale
        assert pg_collection is not None
        self.cp_group = pg_collection.cp

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
        """Causal attention of this process's T tokens of each sequence.

        Args:
            query: [T, B, heads, size], rotated.
            key: [T, B, groups, size], rotated; each group of heads shares one.
            value: [T, B, groups, size].
            attention_mask: None; the mask follows from causality and the packed documents.
            attn_mask_type: causal, or None for the same.
            attention_bias: None.
            packed_seq_params: None; documents are packed as :class:`PackedDocuments` says.

        Returns:
            [T, B, heads * size] in the type of ``value``.
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        assert attn_mask_type in (None, AttnMaskType.causal)
        # The rotated queries and keys come in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self.cp_group.size() == 1:
            return self._attend(query, key, value)
        split = SequenceSplit(query.size(0) * self.cp_group.size(), self.cp_group.size())
        key, value = self._gather(torch.stack((key, value)), split)
        held = split.ranges[self.cp_group.rank()]
        queries = query.split([stop - start for start, stop in held])
        outputs = [self._attend(q, key[:stop], value[:stop]) for q, (_, stop) in zip(queries, held, strict=True)]
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[n, B, heads, size] and [m, B, groups, size] to [n, B, heads * size]; queries are the last n of m tokens."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        seen = self.documents.attention_mask(k.size(2) - q.size(2), k.size(2))
        if self.training and self.dropout is not None and self.dropout.attention:
            return self._attend_with_dropout(q, k, v, seen)
        rule: dict[str, Any] = {"is_causal": True}  # where all are queries
        if seen is not None:
            rule = {"attn_mask": seen}
        elif q.size(2) != k.size(2):
            from torch.nn.attention.bias import causal_lower_right  # takes seconds: it brings torch._dynamo along

            rule = {"attn_mask": causal_lower_right(q.size(2), k.size(2))}
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale, enable_gqa=grouped, **rule)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_with_dropout(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """The same of [B, heads, n, size] and [B, groups, m, size]; ``seen`` keeps packed documents apart."""
        assert self.dropout is not None
        per_group, first = q.size(1) // k.size(1), k.size(2) - q.size(2)
        k, v = (tensor.repeat_interleave(per_group, dim=1) for tensor in (k, v))
        scale = q.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = (q @ k.mT).float() * scale
        if seen is None:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(first)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = self.dropout.drop_attention(weights, self.layer_number, first).to(v.dtype) @ v
        return out.permute(2, 0, 1, 3).flatten(2)

    def _gather(self, own: torch.Tensor, split: SequenceSplit) -> torch.Tensor:
        """This process's keys and values [2, L, B, groups, size] to all [2, T, B, groups, size], in order."""
        everyones = gather_parts(own, self.cp_group).transpose(0, 1).flatten(1, 2)
        order = torch.cat([split.positions(rank) for rank in range(split.ranks)]).argsort()
        return everyones[:, order.to(own.device)]
