"""Steel models for transformers. Travels with exported weights; imports nothing of the library.

Notation: B sequences of T columns, some of them padding; d hidden size; E experts with P slots each, S = E * P.
Norms, rotations and routing are computed in float32, or in float64 if the weights are. In the causal modes a model
decodes with a cache: beside attention's keys and values, each layer keeps a state whose size does not grow with the
text. ``sequence`` is not causal: a new token changes what earlier ones got, so there is nothing to cache, and every
step computes the whole text again.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .configuration_steel import SteelConfig

logger = logging.get_logger(__name__)
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
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


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


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also gives its weights.

    Args:
        module: the attention layer; not used, transformers passes it.
        query: [B, heads, T, size].
        key: [B, key and value heads, past + T, size].
        value: the same.
        attention_mask: [B, 1, T, past + T], added to the scores.
        scaling: of the scores.
        kwargs: settings of other attention functions.

    Returns:
        [B, T, heads, size], and the weights [B, heads, T, past + T].
    """
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = upcast(scores).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SteelAttention(nn.Module):
    """Grouped-query attention with biases on q, k and v only."""

    is_causal = True  # transformers' attention functions read it and the next ones

    def __init__(self, config: SteelConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.size = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        keys = config.num_key_value_heads * self.size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: Any,
        cache: DynamicCache | None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, d] to the same, and the weights if the attention function gives them.

        Args:
            x: tokens.
            angles: from :func:`rotary_angles`.
            mask: as transformers makes it for the attention function in use.
            cache: keys and values of the tokens before; those of ``x`` are added.
            output_attentions: compute eagerly, whatever attention function is in use, since only that gives weights.
            kwargs: for the attention function.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if output_attentions or self.config._attn_implementation == "eager":
            attend: Any = eager_attention
        elif hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        else:  # transformers 5.0
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, mask, dropout=0.0, scaling=self.size**-0.5, **kwargs)
        return self.o_proj(y.flatten(2)), weights


class SteelMLP(nn.Module):
    """One network: Steel's double SwiGLU (``senet``) or SwiGLU (``raw``); no biases."""

    def __init__(self, config: SteelConfig, inner: int) -> None:
        super().__init__()
        gated_down = config.mlp_type == "senet"
        up = ("gate_up_proj", "up_proj") if gated_down else ("gate_proj", "up_proj")
        down = ("gate_down_proj", "down_proj") if gated_down else ("down_proj",)
        self.names = (*up, *down)
        self.sizes = (*[config.hidden_size for _ in up], *[inner for _ in down])
        for name in up:
            setattr(self, name, nn.Linear(config.hidden_size, inner, bias=False))
        for name in down:
            setattr(self, name, nn.Linear(inner, config.hidden_size, bias=False))

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """What the projections multiply by, [out, in] each, gates first: two on the way up, then two or one down."""
        return tuple(matrix_of(getattr(self, name), size) for name, size in zip(self.names, self.sizes, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to the same."""
        return network(x, [getattr(self, name) for name in self.names])


def matrix_of(projection: nn.Module, size: int) -> torch.Tensor:
    """[out, in]: the matrix that a projection without bias multiplies by.

    A plain layer's is its weight. What adapters, hooks or quantisation made of a layer shows only in what it computes,
    so that it is called with the unit vectors. An adapter's dropout then drops an input for all tokens alike.

    Args:
        projection: a linear layer, or what stands in its place.
        size: of its input.
    """
    plain = type(projection) is nn.Linear and "forward" not in vars(projection)  # accelerate puts its own there
    if plain and not (projection._forward_hooks or projection._forward_pre_hooks):
        return cast(nn.Linear, projection).weight
    given = next((p for p in projection.parameters() if p.is_floating_point()), torch.empty(0))
    device = None if given.is_meta else given.device
    return projection(torch.eye(size, dtype=given.dtype, device=device)).T


def network(x: torch.Tensor, projections: list[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """silu(gate up) * up, then silu(gate down) * down or down alone."""
    up_gate, up, *down = projections
    inner = F.silu(up_gate(x)) * up(x)
    if len(down) == 1:
        return down[0](inner)
    return F.silu(down[0](inner)) * down[1](inner)


def products(matrices: tuple[torch.Tensor, ...]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Projections by [N, out, in] matrices, for N batches of tokens."""

    def product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ matrix.transpose(-1, -2)

    return [partial(product, matrix) for matrix in matrices]


def l2_normalize(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Vectors scaled to length 1; shorter ones than 1e-12 are divided by that."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(1e-12)


def is_refresh(count: torch.Tensor, block: int) -> torch.Tensor:
    """Whether slots are made anew before token ``count``: at 1, 2, 4, ... below the block length, then each block."""
    power = (count & (count - 1)) == 0
    return (count > 0) & torch.where(count < block, power, count % block == 0)


def refreshes_before(length: int, block: int) -> list[int]:
    """The tokens below ``length`` at which :func:`is_refresh` holds; 1 is always among them."""
    powers = (2**power for power in range(min(block, length).bit_length()))
    return [power for power in powers if power < min(block, length)] + list(range(block, length, block))


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
        self,
        x: torch.Tensor,
        real: torch.Tensor,
        state: RoutingState | None,
        keep: bool,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RoutingState | None]:
        """[B, T, d] to the same.

        Args:
            x: tokens.
            real: bool [B, T], False for padding.
            state: of the tokens before, None at the beginning.
            keep: whether to return the state after these tokens.
            documents: from :func:`documents_of`; if given, there is no state before and none after.
        """
        whole, step = self.FORWARD[self.mode]
        if documents is not None and self.mode != "token":
            y, state = self._by_document(getattr(self, whole), x, real, documents), None
        elif state is None or step is None:
            y, state = getattr(self, whole)(x, real, keep)
        else:
            y = torch.stack([getattr(self, step)(x[:, t], real[:, t], state) for t in range(x.size(1))], dim=1)
        if hasattr(self, "shared_expert"):
            y = y + self.shared_expert(x)
        return y, state

    @staticmethod
    def _by_document(
        whole: Callable[..., Any], x: torch.Tensor, real: torch.Tensor, documents: torch.Tensor
    ) -> torch.Tensor:
        """Compute packed documents as rows of their own, those of similar length together."""
        number = documents.flatten()
        lengths = number.bincount()
        place = torch.arange(number.numel(), device=number.device) - (lengths.cumsum(0) - lengths)[number]
        group = lengths.double().log2().ceil()  # so that at most half of a row is padding
        pieces, sources = [], []
        for chosen in (group == value for value in group.unique()):
            tokens = chosen[number].nonzero().squeeze(1)
            row, column = (chosen.cumsum(0) - 1)[number[tokens]], place[tokens]
            shape = (int(chosen.sum()), int(lengths[chosen].max()))
            rows = x.new_zeros(*shape, x.size(-1)).index_put((row, column), x.flatten(0, 1)[tokens])
            kept = real.new_zeros(shape).index_put((row, column), real.flatten()[tokens])
            pieces.append(whole(rows, kept, False)[0][row, column])
            sources.append(tokens)
        return torch.cat(pieces)[torch.cat(sources).argsort()].view_as(x)

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
        refresh = torch.tensor(refreshes_before(max(2, x.size(1)), self.block), device=x.device)
        seen = real.unsqueeze(1) & (position.unsqueeze(1) < refresh[None, :, None])  # [B, R, T]
        dispatch = logits.unsqueeze(1).masked_fill(~seen.unsqueeze(-1), -1e30).softmax(2)
        outputs = self._run(torch.einsum("brts,btd->brsd", dispatch, mixed), x.dtype)
        # The last refresh not after the token; the first token reads slots made of itself.
        block = (torch.searchsorted(refresh, position.clamp_min(1), right=True) - 1).clamp_min(0)
        rows = torch.arange(len(x), device=x.device)
        chunk = max(1, CHUNK_BYTES // (len(x) * outputs[0, 0].numel() * upcast(outputs[:0]).itemsize))
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
        y = torch.cat([network(part, products(self._merge(mean, stacked))) for part, mean in parts])
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
        return network(x.unsqueeze(1), products(state.merged)).squeeze(1)


@torch.compiler.disable
def documents_of(
    real: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Find packed documents by any of the ways in which trainers mark them.

    Args:
        real: bool [B, T], False for padding.
        position_ids: int64 [B, T] or [1, T]; where a position does not go on from the one before, a document begins.
        seq_idx: int [B, T], a number for each document.
        cu_seq_lens: int [documents + 1], where documents begin among all B T tokens, and the end of the last.

    Returns:
        int64 [B, T], 0, 1, ... in the order of the tokens; no document is in two rows. None if each row is one.
    """
    starts = torch.zeros_like(real)
    if seq_idx is not None:
        starts[:, 1:] |= (seq_idx[:, 1:] != seq_idx[:, :-1]).to(real.device)
    if cu_seq_lens is not None:
        marked = torch.zeros(real.numel() + 1, dtype=torch.bool, device=real.device)
        marked[cu_seq_lens.long().to(real.device)] = True
        starts |= marked[:-1].view_as(starts)
    if position_ids is not None:
        positions = position_ids.expand_as(real)
        indices = torch.arange(real.size(1), device=real.device)
        # The last real token before each one; -1 if there is none.
        before = F.pad(torch.where(real, indices, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
        previous = positions.gather(1, before.clamp_min(0))
        adjacent = before == indices - 1
        starts |= real & (before >= 0) & torch.where(adjacent, positions != previous + 1, positions <= previous)
    if not starts[:, 1:].any():
        return None
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view_as(starts) - 1


class SteelDecoderLayer(GradientCheckpointingLayer):
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
        mask: Any,
        real: torch.Tensor,
        documents: torch.Tensor | None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, d] to the same.

        Args:
            x: tokens.
            angles: from :func:`rotary_angles`.
            mask: of the attention: see :meth:`SteelAttention.forward`.
            real: bool [B, T], False for padding.
            documents: from :func:`documents_of`.
            cache: of the tokens before; those of ``x`` are added.
            kwargs: for the attention function.
        """
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache, **kwargs)[0]
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SteelMLP):
            return x + self.mlp(normed)
        routing = cache.routing if isinstance(cache, SteelCache) else None
        state = routing[self.layer_idx] if routing else None
        y, state = self.mlp(normed, real, state, routing is not None, documents)
        if routing is not None:
            routing[self.layer_idx] = state
        return x + y


class SteelPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = SteelConfig
    base_model_prefix = "model"
    _no_split_modules = ["SteelDecoderLayer"]  # noqa: RUF012 (transformers reads it from the class)
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

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
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids or their embeddings to hidden states [B, T, d].

        Packed documents do not see each other, in attention or in routing. They are found by ``position_ids``,
        ``seq_idx`` or ``cu_seq_lens_q``, whichever a trainer gives.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], 0 for padding; None if there is none. Where no token's routing depends on
                others (dense, ``token``), also what each token sees, [B, 1 or heads, T, past + T], as bool or as what
                is added to the scores.
            position_ids: int64 [B, T]; None counts real tokens of each document.
            past_key_values: the older name of ``cache``.
            inputs_embeds: [B, T, d], instead of ``input_ids``.
            use_cache: make a cache if none is given; no effect where the model is not causal.
            output_hidden_states: also return the embeddings and each layer's output, the last one after the norm.
            output_attentions: also return each layer's attention weights, [B, heads, T, past + T]; attention is then
                computed eagerly, whatever ``attn_implementation`` says.
            cache: of the tokens before; those of this call are added.
            seq_idx: int [B, T], a number for each packed document.
            cu_seq_lens_q: int [documents + 1], where packed documents begin, and the end of the last.
            kwargs: for the attention function.

        Raises:
            ValueError: the arguments do not fit together, or the model cannot use them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        output_hidden_states, output_attentions = (
            getattr(self.config, name) if value is None else value
            for name, value in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
            )
        )
        config = self.config
        if output_attentions and config._attn_implementation != "eager":
            logger.warning_once("output_attentions: attention is computed eagerly, since only that shows its weights")
            config = copy.copy(config)
            config._attn_implementation = "eager"
        given = past_key_values if cache is None else cache
        past = given.get_seq_length() if given is not None else 0
        batch, length = x.shape[:2]
        if length == 0:
            raise ValueError("a sequence needs at least one token")
        real, positions = self._real(attention_mask, x, past)
        documents = None
        says_all = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4
        if length > 1 and not says_all and not (position_ids is None and seq_idx is None and cu_seq_lens_q is None):
            documents = documents_of(real, position_ids, seq_idx, cu_seq_lens_q)
        if documents is not None and (given is not None or use_cache):
            raise ValueError("packed documents cannot be decoded with a cache: call with use_cache=False")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and documents is None
        cache = self._cache(given, use_cache)
        if position_ids is None:
            position_ids = positions
            if documents is not None:
                first = torch.diff(documents, dim=1, prepend=documents[:, :1] - 1) != 0
                position_ids = position_ids - torch.where(first, position_ids, 0).cummax(1).values
        position_ids = position_ids.expand(batch, -1)
        mask = self._mask(config, x, attention_mask, cache, documents)
        size = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(position_ids, size, self.config.rope_theta)
        if documents is not None:  # flash attention finds them by the positions alone
            flash = ("cu_seq_lens_k", "max_length_q", "max_length_k")
            kwargs = {name: kwargs[name] for name in kwargs if name not in flash} | {"position_ids": position_ids}
        states, attentions = [x], []
        for layer in self.layers:
            with contextlib.ExitStack() as stack:
                if output_attentions:
                    attention = cast(nn.Module, layer.self_attn)
                    hook = attention.register_forward_hook(lambda *call: attentions.append(call[-1][1]))
                    stack.callback(hook.remove)
                shown = {"output_attentions": output_attentions}
                x = layer(x, angles, mask, real, documents, cache=cache, **shown, **kwargs)
            if output_hidden_states:
                states.append(x)
        x = states[-1] = self.norm(x)
        outputs: dict[str, Any] = {
            "last_hidden_state": x,
            CACHE: cache,
            "hidden_states": tuple(states) if output_hidden_states else None,
            "attentions": tuple(attentions) if output_attentions else None,
        }
        return BaseModelOutputWithPast(**outputs)

    def _real(self, mask: Any, x: torch.Tensor, past: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [B, T] of the tokens that are no padding, and their positions, int64 [B, T] or [1, T]."""
        batch, length = x.shape[:2]
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            if mask is not None and (self.config.has_running_sums or not self.config.routes_causally):
                raise ValueError(
                    f"attention_mask has four axes; routing_mode {self.config.routing_mode!r} also routes by what is "
                    "padding and where documents begin: give it two axes, and position_ids or seq_idx for documents"
                )
            positions = torch.arange(length, device=x.device)[None] + past
            return torch.ones((batch, length), dtype=torch.bool, device=x.device), positions
        shape = (batch, past + length)
        if isinstance(mask, torch.Tensor) and mask.shape == shape:
            real = mask.bool()
            return real[:, past:], (real.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be {list(shape)}, since the routing reads it too; it is {found}")

    @staticmethod
    def _mask(
        config: PretrainedConfig,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: DynamicCache | None,
        documents: torch.Tensor | None,
    ) -> Any:
        """What the configuration's attention function takes for causality, padding and documents."""
        # Without positions, transformers does not look for documents itself.
        given: dict[str, Any] = {"attention_mask": attention_mask, CACHE: cache}
        if documents is not None:
            if "flash" in config._attn_implementation and (len(x) > 1 or attention_mask is not None):
                raise ValueError("flash attention computes packed documents in one row without attention_mask only")
            given["and_mask_function"] = lambda row, head, q, k: documents[row, q] == documents[row, k]
        past = cache.get_seq_length() if cache is not None else 0
        given["cache_position"] = torch.arange(past, past + x.size(1), device=x.device)
        return create_causal_mask(config, x, **{name: given[name] for name in given if name in MASK_ARGUMENTS})

    def _cache(self, given: DynamicCache | None, use_cache: bool) -> DynamicCache | None:
        if not self.config.routes_causally:
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


class SteelForCausalLM(SteelPreTrainedModel, GenerationMixin):
    """The model with its output matrix, and transformers' generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (where the config ties them)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 (cut as the embedding is, which it may be tied to)

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
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give generation a cache that also keeps the routing, or none where the model is not causal."""
        assisted = generation_config.prompt_lookup_num_tokens or model_kwargs.get("assistant_model") is not None
        if assisted and self.config.has_running_sums:
            raise ValueError("assisted generation takes tokens back, which a routing state cannot: decode without it")
        named = generation_config.cache_implementation
        if named is not None and named.startswith("dynamic"):  # the kind that it gets anyway
            named = generation_config.cache_implementation = None
        if named is not None and self.config.has_running_sums:
            raise ValueError(
                f"cache_implementation {named!r} has no place for the routing of routing_mode "
                f"{self.config.routing_mode!r}, which is in a SteelCache: leave it out"
            )
        if not self.config.routes_causally:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    f"routing_mode {self.config.routing_mode!r} computes the whole text at each step: give input_ids, "
                    "not inputs_embeds"
                )
            generation_config.use_cache = False
            model_kwargs["use_cache"] = False
        elif generation_config.use_cache and model_kwargs.get(CACHE) is None and named is None:
            model_kwargs[CACHE] = SteelCache(self.config)
        prepare: Any = GenerationMixin._prepare_cache_for_generation
        return prepare(self, generation_config, model_kwargs, *args, **kwargs)


class SteelForSequenceClassification(GenericForSequenceClassification, SteelPreTrainedModel):
    """The model with a score for each label, read at the last token that is no padding."""

    def __init__(self, config: SteelConfig) -> None:
        # Not the generic one's, which looks for the base model among those that transformers knows.
        SteelPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SteelModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
