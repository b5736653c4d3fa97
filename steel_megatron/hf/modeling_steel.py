"""Steel models for transformers. Travels with exported weights; imports nothing of the library.

Notation: B sequences of T columns, some of them padding; d hidden size; E experts with P slots each, S = E * P.
Norms, rotations and routing are computed in float32, or in float64 if the weights are. In the causal modes a model
decodes with a cache: beside attention's keys and values, each layer keeps a state whose size does not grow with the
text. ``sequence`` is not causal: a new token changes what earlier ones got, so there is nothing to cache, and every
step computes the whole text again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_steel import SteelConfig

CHUNK_BYTES = 2**28  # of a prompt's largest intermediate results at a time, so that memory does not grow with it


@dataclass
class RoutingState:
    """What a Soft-MoE layer keeps between calls; every tensor has the batch as its first axis.

    Attributes:
        count: int64 [B], tokens seen so far.
        largest: [B, S] block_causal: running maximum of the logits.
        total: [B, S] block_causal: sum of exp(logit - largest).
        weighted: [B, S, d] block_causal: sum of exp(logit - largest) times the mixed token.
        outputs: [B, S, d] block_causal: what the experts made of the current block's slots.
        segment: [B, d] merged: sum of the mixed tokens of the current segment.
        merged: [B, ...] merged: the current segment's merged matrices, one tensor after the other.
    """

    count: torch.Tensor
    largest: torch.Tensor | None = None
    total: torch.Tensor | None = None
    weighted: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    merged: tuple[torch.Tensor, ...] | None = None

    def take(self, rows: torch.Tensor) -> None:
        """Keep the given rows of the batch, in the given order; rows may repeat."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                setattr(self, field.name, tuple(part.index_select(0, rows.to(part.device)) for part in value))
            elif value is not None:
                setattr(self, field.name, value.index_select(0, rows.to(value.device)))


# transformers 5.24 calls the cache `cache`, in what models take and give; before it was `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class SteelCache(DynamicCache):
    """Attention's keys and values, and every layer's routing state."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.routing: list[RoutingState | None] = [None] * config.num_hidden_layers
        self.has_running_sums = config.has_running_sums

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.routing = [None] * len(self.routing)

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back, as speculative decoding does."""
        return not self.has_running_sums

    def _take(self, rows: torch.Tensor) -> None:
        for state in self.routing:
            if state is not None:
                state.take(rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows that beam search goes on with."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        for state in self.routing:
            if state is not None:
                state.take(torch.arange(len(state.count)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._take(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; refused where they are part of running sums."""
        if self.has_running_sums:
            raise NotImplementedError("this SteelCache cannot be cropped: its routing states are running sums")
        super().crop(tokens_to_remove)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """The same in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


class SteelRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same, in the type of ``x``."""
        return F.rms_norm(upcast(x), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def rotary_angles(positions: torch.Tensor, size: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864, section 3.2.2).

    Args:
        positions: int64 [B, T].
        size: of a head, even.
        base: angle i of a position is position / base ** (2 i / size).

    Returns:
        Both float32 [B, 1, T, size], the second half of the last axis equal to the first.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = positions.float().unsqueeze(-1) / base**exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rotary embedding in float32: [B, heads, T, size] to the same, in the type of ``x``."""
    tokens = upcast(x)
    first, second = tokens.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (tokens * angles[0] + turned * angles[1]).to(x.dtype)


class SteelAttention(nn.Module):
    """Grouped-query attention with biases on q, k and v only."""

    def __init__(self, config: SteelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.size = config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads * self.size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """[B, T, d] to the same.

        Args:
            x: tokens.
            angles: from :func:`rotary_angles`.
            mask: bool [B, 1, T, past + T], False for keys that a query must not see; None for plain causality.
            cache: keys and values of the tokens before; those of ``x`` are added.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = mask is None and q.size(2) > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1)
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SteelMLP(nn.Module):
    """One network: Steel's double SwiGLU (``senet``) or SwiGLU (``raw``); no biases."""

    def __init__(self, config: SteelConfig, inner: int) -> None:
        super().__init__()
        gated_down = config.mlp_type == "senet"
        up = ("gate_up_proj", "up_proj") if gated_down else ("gate_proj", "up_proj")
        down = ("gate_down_proj", "down_proj") if gated_down else ("down_proj",)
        self.names = (*up, *down)
        for name in up:
            setattr(self, name, nn.Linear(config.hidden_size, inner, bias=False))
        for name in down:
            setattr(self, name, nn.Linear(inner, config.hidden_size, bias=False))

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The weights, gates first: two on the way up, then two or one on the way down."""
        return tuple(getattr(self, name).weight for name in self.names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to the same."""
        return network(x, self.matrices())


def network(x: torch.Tensor, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """silu(gate up) * up, then silu(gate down) * down or down alone; matrices may be batched as ``x`` is."""
    up_gate, up, *down = (matrix.transpose(-1, -2) for matrix in matrices)
    inner = F.silu(x @ up_gate) * (x @ up)
    if len(down) == 1:
        return inner @ down[0]
    return F.silu(inner @ down[0]) * (inner @ down[1])


def l2_normalize(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Vectors scaled to length 1; shorter ones than 1e-12 are divided by that."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(1e-12)


def is_refresh(count: torch.Tensor, block: int) -> torch.Tensor:
    """Whether slots are made anew before token ``count``: at 1, 2, 4, ... below the block length, then each block."""
    power = (count & (count - 1)) == 0
    return (count > 0) & torch.where(count < block, power, count % block == 0)


class SteelSoftMoE(nn.Module):
    """Soft mixture of experts (arXiv 2308.00951); ``configuration_steel.ROUTING_MODES`` lists its modes."""

    # Of each mode: what computes texts from their beginning, and one column of tokens after others. Without the
    # latter nothing is kept between calls.
    FORWARD: ClassVar[dict[str, tuple[str, str | None]]] = {
        "sequence": ("_sequence", None),
        "block_causal": ("_block_causal", "_block_causal_step"),
        "token": ("_token", None),
        "merged": ("_merged", "_merged_step"),
    }

    def __init__(self, config: SteelConfig) -> None:
        super().__init__()
        self.mode, self.mix, self.block = config.routing_mode, config.routing_mix, config.routing_block_length
        self.std = config.initializer_range
        inner = config.inner_size
        self.phi = nn.Parameter(torch.empty(config.hidden_size, config.n_experts, config.slots_per_expert))
        self.scale = nn.Parameter(torch.ones(1))
        self.experts = nn.ModuleList(SteelMLP(config, inner) for _ in range(config.n_experts))
        if config.shared_expert_intermediate_size:
            self.shared_expert = SteelMLP(config, config.shared_expert_intermediate_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the routing's own parameters; experts have theirs."""
        nn.init.normal_(self.phi, std=self.std)
        nn.init.ones_(self.scale)

    def forward(
        self, x: torch.Tensor, real: torch.Tensor, state: RoutingState | None, keep: bool
    ) -> tuple[torch.Tensor, RoutingState | None]:
        """[B, T, d] to the same.

        Args:
            x: tokens.
            real: bool [B, T], False for padding.
            state: of the tokens before, None at the beginning.
            keep: whether to return the state after these tokens.
        """
        whole, step = self.FORWARD[self.mode]
        if state is None or step is None:
            y, state = getattr(self, whole)(x, real, keep)
        else:
            y = torch.stack([getattr(self, step)(x[:, t], real[:, t], state) for t in range(x.size(1))], dim=1)
        if hasattr(self, "shared_expert"):
            y = y + self.shared_expert(x)
        return y, state

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., S] and what is mixed into slots [..., d], in float32."""
        tokens = upcast(x)
        normalized = l2_normalize(tokens)
        keys = upcast(self.scale) * l2_normalize(upcast(self.phi).flatten(1), dim=0)
        return normalized @ keys, normalized if self.mix == "normalized" else tokens

    def _run(self, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[..., S, d] to the same: every expert on its own slots, in the weights' type."""
        by_expert = slots.to(dtype).unflatten(-2, (len(self.experts), -1))
        results = [expert(by_expert[..., number, :, :]) for number, expert in enumerate(self.experts)]
        return torch.stack(results, dim=-3).flatten(-3, -2)

    def _sequence(self, x: torch.Tensor, real: torch.Tensor, keep: bool) -> tuple[torch.Tensor, None]:
        logits, mixed = self._route(x)
        dispatch = logits.masked_fill(~real.unsqueeze(-1), -1e30).softmax(1)
        outputs = self._run(dispatch.transpose(1, 2) @ mixed, x.dtype)
        return (logits.softmax(-1) @ upcast(outputs)).to(x.dtype), None

    def _token(self, x: torch.Tensor, real: torch.Tensor, keep: bool) -> tuple[torch.Tensor, None]:
        logits, mixed = self._route(x)
        results = torch.stack([expert(mixed.to(x.dtype)) for expert in self.experts], dim=-2)
        return (self._shares(logits, x.dtype).unsqueeze(-1) * results).sum(-2), None

    def _block_causal(
        self, x: torch.Tensor, real: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, RoutingState | None]:
        logits, mixed = self._route(x)
        position = real.long().cumsum(1) - 1  # of a real token among those of its row
        count = position[:, -1] + 1
        tokens = torch.arange(1, max(2, int(count.max())), device=x.device)
        refresh = tokens[is_refresh(tokens, self.block)]  # token 1 is always among them
        seen = real.unsqueeze(1) & (position.unsqueeze(1) < refresh[None, :, None])  # [B, R, T]
        dispatch = logits.unsqueeze(1).masked_fill(~seen.unsqueeze(-1), -1e30).softmax(2)
        outputs = self._run(torch.einsum("brts,btd->brsd", dispatch, mixed), x.dtype)
        # The last refresh not after the token; the first token reads slots made of itself.
        block = (torch.searchsorted(refresh, position.clamp_min(1), right=True) - 1).clamp_min(0)
        rows = torch.arange(len(x), device=x.device)
        chunk = max(1, CHUNK_BYTES // upcast(outputs[:, 0]).nbytes)
        parts = zip(logits.softmax(-1).split(chunk, 1), block.split(chunk, 1), strict=True)
        pieces = [torch.einsum("bts,btsd->btd", share, upcast(outputs[rows[:, None], read])) for share, read in parts]
        y = torch.cat(pieces, 1).to(x.dtype)
        if not keep:
            return y, None
        visible = logits.masked_fill(~real.unsqueeze(-1), -1e30)
        largest = visible.amax(1)
        exponentials = (visible - largest.unsqueeze(1)).exp() * real.unsqueeze(-1)  # 0 in rows of padding alone
        return y, RoutingState(
            count=count,
            largest=largest,
            total=exponentials.sum(1),
            weighted=exponentials.transpose(1, 2) @ mixed,
            outputs=outputs[rows, block[:, -1]],
        )

    def _block_causal_step(self, x: torch.Tensor, real: torch.Tensor, state: RoutingState) -> torch.Tensor:
        """One column [B, d]; changes ``state``."""
        assert state.largest is not None and state.total is not None and state.weighted is not None
        assert state.outputs is not None
        logits, mixed = self._route(x)
        first = real & (state.count == 0)
        refresh = is_refresh(state.count, self.block) & real & ~first
        if refresh.any():
            made = self._run(state.weighted / state.total.clamp_min(1e-30).unsqueeze(-1), x.dtype)
            state.outputs = torch.where(refresh[:, None, None], made, state.outputs)
        largest = torch.where(real.unsqueeze(-1), torch.maximum(state.largest, logits), state.largest)
        before = (state.largest - largest).exp()
        # Filled before the exponential: a row that has seen no token yet would give infinity times zero.
        own = (logits - largest).masked_fill(~real.unsqueeze(-1), float("-inf")).exp()
        state.largest = largest
        state.total = state.total * before + own
        state.weighted = state.weighted * before.unsqueeze(-1) + own.unsqueeze(-1) * mixed.unsqueeze(1)
        state.count = state.count + real.long()
        if first.any():  # slots made of the first token itself
            made = self._run(mixed.unsqueeze(1).expand_as(state.weighted), x.dtype)
            state.outputs = torch.where(first[:, None, None], made, state.outputs)
        return torch.einsum("bs,bsd->bd", logits.softmax(-1), upcast(state.outputs)).to(x.dtype)

    def _shares(self, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[..., S] to what each expert gets, [..., E]."""
        return logits.softmax(-1).unflatten(-1, (len(self.experts), -1)).sum(-1).to(dtype)

    def _stacked(self) -> tuple[torch.Tensor, ...]:
        """The experts' matrices, [E, out, in] each."""
        experts: list[Any] = list(self.experts)
        return tuple(torch.stack(matrices) for matrices in zip(*(one.matrices() for one in experts), strict=True))

    def _merge(self, means: torch.Tensor, stacked: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """[N, d] to the merged matrices of N experts, by the routing of the means."""
        shares = self._shares(self._route(means)[0], stacked[0].dtype)
        return tuple((shares @ matrices.flatten(1)).unflatten(1, matrices.shape[1:]) for matrices in stacked)

    def _merged(self, x: torch.Tensor, real: torch.Tensor, keep: bool) -> tuple[torch.Tensor, RoutingState | None]:
        _, mixed = self._route(x)
        batch, length, width = x.shape
        position = real.long().cumsum(1) - 1
        count = position[:, -1] + 1
        # Rows without their padding: real tokens first.
        order = torch.argsort((~real).long(), dim=1, stable=True)
        packed_x, packed = (torch.take_along_dim(t, order.unsqueeze(-1), 1) for t in (x, mixed))
        packed = packed * (torch.arange(length, device=x.device) < count.unsqueeze(1)).unsqueeze(-1)
        segments = -(-length // self.block)
        padding = (0, 0, 0, segments * self.block - length)
        sums = F.pad(packed, padding).unflatten(1, (segments, self.block)).sum(2)
        means = torch.cat((packed[:, :1], sums[:, :-1] / self.block), dim=1)
        blocks = F.pad(packed_x, padding).view(batch * segments, self.block, width)
        stacked = self._stacked()
        chunk = max(1, CHUNK_BYTES // sum(matrices[0].nbytes for matrices in stacked))  # segments
        parts = zip(blocks.split(chunk), means.flatten(0, 1).split(chunk), strict=True)
        y = torch.cat([network(part, self._merge(mean, stacked)) for part, mean in parts])
        y = y.view(batch, segments * self.block, width)[:, :length]
        y = torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)
        if not keep:
            return y, None
        rows, last = torch.arange(batch, device=x.device), (count - 1).clamp_min(0) // self.block
        kept = self._merge(means[rows, last], stacked)
        return y, RoutingState(count=count, segment=sums[rows, last], merged=kept)

    def _merged_step(self, x: torch.Tensor, real: torch.Tensor, state: RoutingState) -> torch.Tensor:
        """One column [B, d]; changes ``state``."""
        assert state.segment is not None and state.merged is not None
        _, mixed = self._route(x)
        fresh = real & (state.count % self.block == 0)
        if fresh.any():
            means = torch.where((state.count == 0).unsqueeze(-1), mixed, state.segment / self.block)
            made = self._merge(means, self._stacked())
            pairs = zip(made, state.merged, strict=True)
            state.merged = tuple(torch.where(fresh[:, None, None], new, old) for new, old in pairs)
            state.segment = torch.where(fresh.unsqueeze(-1), torch.zeros_like(mixed), state.segment)
        state.segment = state.segment + mixed * real.unsqueeze(-1)
        state.count = state.count + real.long()
        return network(x.unsqueeze(1), state.merged).squeeze(1)


class SteelDecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: SteelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = SteelAttention(config, layer_idx)
        inner = config.inner_size
        self.mlp = SteelMLP(config, inner) if config.FFN_type == "raw" else SteelSoftMoE(config)
        self.input_layernorm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        real: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """[B, T, d] to the same.

        Args:
            x: tokens.
            angles: from :func:`rotary_angles`.
            mask: of the attention: see :meth:`SteelAttention.forward`.
            real: bool [B, T], False for padding.
            cache: of the tokens before; those of ``x`` are added.
        """
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SteelMLP):
            return x + self.mlp(normed)
        routing = cache.routing if isinstance(cache, SteelCache) else None
        y, state = self.mlp(normed, real, routing[self.layer_idx] if routing else None, routing is not None)
        if routing is not None:
            routing[self.layer_idx] = state
        return x + y


class SteelPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = SteelConfig
    base_model_prefix = "model"
    _no_split_modules = ["SteelDecoderLayer"]  # noqa: RUF012 (transformers reads it from the class)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SteelSoftMoE):
            module.reset_parameters()
        elif isinstance(module, SteelRMSNorm):
            nn.init.ones_(module.weight)


class SteelModel(SteelPreTrainedModel):
    """The layers without the output matrix."""

    def __init__(self, config: SteelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SteelDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = SteelRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids or their embeddings to hidden states [B, T, d].

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], 0 for padding; None if there is none.
            position_ids: int64 [B, T]; None counts real tokens.
            past_key_values: the older name of ``cache``.
            inputs_embeds: [B, T, d], instead of ``input_ids``.
            use_cache: make a cache if none is given; no effect where the model is not causal.
            output_hidden_states: also return the embeddings and each layer's output, the last one after the norm.
            output_attentions: refused if true.
            cache: of the tokens before; those of this call are added.

        Raises:
            ValueError: the arguments do not fit together, or the model cannot use them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions: attention weights are never stored here")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        batch, length = x.shape[:2]
        if length == 0:
            raise ValueError("a sequence needs at least one token")
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.bool, device=x.device)
        real = attention_mask.bool()
        if real.shape != (batch, past + length):
            raise ValueError(f"attention_mask must be {[batch, past + length]}; it is {list(real.shape)}")
        if position_ids is None:
            position_ids = (real.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        mask = self._mask(real, past)
        size = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(position_ids.expand(batch, -1), size, self.config.rope_theta)
        states = [x]
        for layer in self.layers:
            x = layer(x, angles, mask, real[:, past:], cache)
            if output_hidden_states:
                states.append(x)
        x = states[-1] = self.norm(x)
        states_of_layers = tuple(states) if output_hidden_states else None
        outputs: dict[str, Any] = {"last_hidden_state": x, CACHE: cache, "hidden_states": states_of_layers}
        return BaseModelOutputWithPast(**outputs)

    def _cache(self, given: DynamicCache | None, use_cache: bool) -> DynamicCache | None:
        if not self.config.is_causal:
            if given is not None and given.get_seq_length():
                raise ValueError(
                    f"routing_mode {self.config.routing_mode!r} is not causal: it cannot go on from a cache"
                )
            return None
        if given is None:
            return SteelCache(self.config) if use_cache else None
        if self.config.has_running_sums and not isinstance(given, SteelCache):
            raise ValueError(f"{CACHE} must be a SteelCache, which keeps the routing; it is {type(given).__name__}")
        return given

    @staticmethod
    def _mask(real: torch.Tensor, past: int) -> torch.Tensor | None:
        """bool [B, 1, T, past + T] of the keys that each query sees; None where plain causality is all there is."""
        total = real.size(1)
        if real.all() and (past == 0 or total - past == 1):
            return None
        keys = torch.arange(total, device=real.device)
        queries = keys[past:, None]
        # Padding sees itself, so that no row of the softmax is empty.
        return ((keys <= queries) & real[:, None, None, :]) | (keys == queries)


class SteelForCausalLM(SteelPreTrainedModel, GenerationMixin):
    """The model with its output matrix, and transformers' generation."""

    def __init__(self, config: SteelConfig) -> None:
        super().__init__(config)
        self.model = SteelModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, kept, V] and, with labels, the loss. Other arguments and errors: :meth:`SteelModel.forward`.

        Args:
            labels: int64 [B, T], not shifted: position t is held against label t + 1; -100 does not count.
            logits_to_keep: how many of the last positions get logits, 0 for all; or the positions, int64 [n].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give generation a cache that also keeps the routing, or none where the model is not causal."""
        assisted = generation_config.prompt_lookup_num_tokens or model_kwargs.get("assistant_model") is not None
        if assisted and self.config.has_running_sums:
            raise ValueError("assisted generation takes tokens back, which a routing state cannot: decode without it")
        if not self.config.is_causal:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    f"routing_mode {self.config.routing_mode!r} computes the whole text at each step: give input_ids, "
                    "not inputs_embeds"
                )
            generation_config.use_cache = False
            model_kwargs["use_cache"] = False
        elif generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = SteelCache(self.config)
        prepare: Any = GenerationMixin._prepare_cache_for_generation
        return prepare(self, generation_config, model_kwargs, *args, **kwargs)
