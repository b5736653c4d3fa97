"""Soft-MoE as a plain torch module, for people who want the layer in a model of their own.

It needs no process groups and no megatron-core; its weights have the names and shapes of the layer that trains under
every layout (:class:`steel_megatron.model.soft_moe.ParallelSoftMoE`), and it computes the same.
"""

from __future__ import annotations

import torch
from torch import nn

from steel_megatron.config import Activation, SlotInput, take_old_names
from steel_megatron.config.checks import at_least, one_of
from steel_megatron.errors import ConfigError
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.routing import OldNames, routing_mode
from steel_megatron.model.routing.merging import merged_linear, swiglu
from steel_megatron.ops.plan import check_document_starts


class FeedForwards(nn.Module):
    """E feed-forward networks side by side: SwiGLU, or Steel's double SwiGLU (Steel-LLM, section 3.2).

    Args:
        count: E.
        hidden_size: d.
        inner_size: I, inner width of each.
        activation: what each computes.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        inner_size: int,
        activation: Activation,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        down = 2 if activation == "double_swiglu" else 1
        self.up = nn.Parameter(torch.empty(count, 2, inner_size, hidden_size, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(count, down, hidden_size, inner_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 1 / sqrt(inputs), so that each product keeps the size of its vector."""
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.size(-1) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[E, N, d], or [1, N, d] where all networks get the same vectors, to [E, N, d]."""
        up, down = self._matrices(x.dtype)
        out = torch.bmm(swiglu(torch.bmm(x.expand(up.size(0), -1, -1), up.mT)), down.mT)
        return out if self.down.size(1) == 1 else swiglu(out)

    def forward_merged(self, segments: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each segment [M, N, d] through the network that its weights [M, E] merge of all, to [M, N, d]."""
        up, down = self._matrices(segments.dtype)
        shares = weights.unsqueeze(0)
        out = merged_linear(swiglu(merged_linear(segments, shares, up)), shares, down)
        return out if self.down.size(1) == 1 else swiglu(out)

    def _matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[E, 2 I, d] and [E, d or 2 d, I]; another type than the weights' is autocast's."""
        return self.up.to(dtype).flatten(1, 2), self.down.to(dtype).flatten(1, 2)


class SharedExpert(nn.Module):
    """The network that every token passes through."""

    def __init__(self, network: FeedForwards) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d] to the same."""
        return self.network(x.reshape(1, -1, x.size(-1))).view(x.shape)


class SoftMoE(OldNames, nn.Module):
    """Soft mixture of experts: [B, T, d] to [B, T, d] (Soft MoE, arXiv 2308.00951, section 2.1).

    Tokens are mixed into slots, each expert computes its slots, and every token gets a mixture of the results; how
    exactly is the routing mode's (docs/new_routing_mode.md). Routing runs on compiled kernels where the extension is
    built and the type is float32, bfloat16 or float16, else in plain PyTorch; its arithmetic is in float32, or in
    float64 if the tokens are. Under autocast the experts compute in autocast's type.

    Example:
        >>> import torch
        >>> from steel_megatron import SoftMoE
        >>> layer = SoftMoE(hidden_size=64, num_experts=4, slots_per_expert=2, mode="block_causal", block_length=16)
        >>> y = layer(torch.randn(8, 100, 64))
        >>> y.shape
        torch.Size([8, 100, 64])
        >>> y.square().mean().backward()
        >>> sorted(layer.state_dict())
        ['experts.down', 'experts.up', 'phi', 'scale']

    Args:
        hidden_size: d.
        num_experts: E.
        slots_per_expert: P, slots that each expert computes per sequence or block.
        mode: ``sequence`` (the paper's; every token sees all others), or one of the causal ones ``block_causal``,
            ``merged`` and ``token``, or ``module:name`` of a mode of your own.
        ffn_hidden_size: inner width of one expert; None for hidden_size.
        activation: what an expert computes: ``double_swiglu`` (Steel-LLM, section 3.2) or ``swiglu``.
        slot_input: what is mixed into slots: ``raw`` tokens, or ``normalized`` ones as in Steel-LLM.
        block_length: tokens between two refreshes of the slots (block_causal), or of one segment (merged).
        shared_expert_intermediate_size: inner width of one more expert that every token passes through; 0 for none.
        routing_scale_init: initial length of the slots' keys: logits are at most this large.
        routing_mix: old name of slot_input.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ConfigError: an argument is out of range, or there is no such mode.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        mode: str,
        ffn_hidden_size: int | None = None,
        activation: Activation = "double_swiglu",
        slot_input: SlotInput = "raw",
        block_length: int = 64,
        shared_expert_intermediate_size: int = 0,
        routing_scale_init: float = 1.0,
        routing_mix: SlotInput | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.slots_per_expert = hidden_size, num_experts, slots_per_expert
        self.ffn_hidden_size = hidden_size if ffn_hidden_size is None else ffn_hidden_size
        self.activation, self.slot_input, self.block_length = activation, slot_input, block_length
        take_old_names(self, routing_mix=routing_mix)
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.routing_scale_init = routing_scale_init
        at_least(1, self, "hidden_size", "num_experts", "slots_per_expert", "ffn_hidden_size", "block_length")
        at_least(0, self, "shared_expert_intermediate_size", "routing_scale_init")
        one_of(("double_swiglu", "swiglu"), self, "activation")
        one_of(("normalized", "raw"), self, "slot_input")
        self.mode = routing_mode(mode)
        self.mode.check_model(self)
        shape = (hidden_size, num_experts, slots_per_expert)
        self.phi = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.experts = FeedForwards(num_experts, hidden_size, self.ffn_hidden_size, activation, device, dtype)
        shared = shared_expert_intermediate_size
        self.shared_expert = (
            SharedExpert(FeedForwards(1, hidden_size, shared, activation, device, dtype)) if shared else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the routing's own parameters; experts have theirs."""
        nn.init.normal_(self.phi, std=self.hidden_size**-0.5)
        nn.init.constant_(self.scale, self.routing_scale_init)

    def extra_repr(self) -> str:
        """The routing, for ``print(layer)``."""
        return f"{self.hidden_size}, {self.num_experts}, {self.slots_per_expert}, mode={self.mode.name!r}"

    def forward(self, x: torch.Tensor, document_starts: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: [B, T, d] tokens, in the type of the weights, or any floating point type under autocast.
            document_starts: int64 [B, T], for each token the position of the first token of its document, where
                sequences hold several; each is then computed as if it were alone.

        Returns:
            [B, T, d] in the type of ``x``; under autocast in autocast's type.

        Raises:
            ConfigError: the shape, type or device of an argument is wrong, or the mode cannot keep documents apart.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            with torch.autocast(kind, enabled=False):
                return self._compute(x.to(torch.get_autocast_dtype(kind)), document_starts)
        if x.dtype != self.phi.dtype:
            raise ConfigError(
                f"SoftMoE got tokens of {x.dtype}, its weights are {self.phi.dtype}; give both one type or use autocast"
            )
        return self._compute(x, document_starts)

    def _compute(self, x: torch.Tensor, document_starts: torch.Tensor | None) -> torch.Tensor:
        if x.dim() != 3 or x.size(1) == 0 or x.size(2) != self.hidden_size or x.device != self.phi.device:
            raise ConfigError(
                f"SoftMoE got {list(x.shape)} on {x.device}; it needs [B, T >= 1, {self.hidden_size}] on "
                f"{self.phi.device}"
            )
        if document_starts is None:
            y = self.mode.forward(self, x)
        elif not self.mode.packs_documents:
            raise ConfigError(
                f"mode {self.mode.name} cannot keep documents apart; call SoftMoE without document_starts"
            )
        else:
            check_document_starts(document_starts, x.size(0), x.size(1), "document_starts")
            documents = PackedDocuments()
            documents.set(document_starts.to(x.device))
            y = self.mode.forward_documents(self, x, documents)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def run_experts(self, vectors: torch.Tensor, *, replicated: bool = False) -> torch.Tensor:
        """Every expert on its own vectors: see :class:`steel_megatron.model.routing.RoutedLayer`."""
        return self.experts(vectors)

    def run_merged_experts(
        self, segments: torch.Tensor, weights: torch.Tensor, *, equal_segments: bool = True
    ) -> torch.Tensor:
        """Each segment through its merged expert; ``equal_segments`` does not matter on one process.

        Args: as for :meth:`steel_megatron.model.routing.RoutedLayer.run_merged_experts`.
        """
        return self.experts.forward_merged(segments, weights)
