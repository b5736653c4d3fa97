"""Settings of a Steel model for transformers. Travels with exported weights; imports nothing of the library."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PretrainedConfig


class RoutingModeFacts(NamedTuple):
    """What settings know of a routing mode.

    Attributes:
        causal: whether no token's output depends on a later token.
        running_sums: whether decoding keeps sums over the tokens so far, out of which none can be taken again.
    """

    causal: bool
    running_sums: bool


# SteelSoftMoE.FORWARD in modeling_steel.py has what each of them computes.
ROUTING_MODES = {
    "sequence": RoutingModeFacts(causal=False, running_sums=False),
    "block_causal": RoutingModeFacts(causal=True, running_sums=True),
    "token": RoutingModeFacts(causal=True, running_sums=False),
    "merged": RoutingModeFacts(causal=True, running_sums=True),
}


class SteelConfig(PretrainedConfig):
    """A Llama-like model whose feed-forward layers are Soft-MoE (Steel-LLM, arXiv 2502.06635) or dense.

    Dropout is no part of it: what a run dropped in training, inference does not.

    Keys as published, and below them those that the published models do not have; their defaults are what the
    published models do.

    Args:
        FFN_type: ``softmoe_v3`` for a Soft-MoE in every layer, ``raw`` for one dense network.
        mlp_type: ``senet`` for Steel's double SwiGLU, ``raw`` for SwiGLU.
        intermediate_size: with ``mlp_div_ratio``, the inner width of one expert or of the dense network is
            ``intermediate_size // mlp_div_ratio``.
        expert_intermediate_size: that width itself, where it is not such a quotient.
        n_experts: experts of a layer.
        slots_per_expert: slots of each.
        routing_mode: ``sequence`` (not causal), ``block_causal``, ``token`` or ``merged``.
        routing_mix: what is mixed into slots: ``normalized`` tokens, or ``raw`` ones.
        routing_block_length: tokens between two refreshes of the slots, or of one segment.
        shared_expert_intermediate_size: inner width of an expert that every token passes through; 0 for none.
    """

    model_type = "steel"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads it from the class)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1792,
        intermediate_size: int = 1792,
        mlp_div_ratio: int = 4,
        num_hidden_layers: int = 18,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 1_000_000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        hidden_act: str = "silu",
        FFN_type: str = "softmoe_v3",
        mlp_type: str = "senet",
        n_experts: int = 6,
        slots_per_expert: int = 1,
        routing_mode: str = "sequence",
        routing_mix: str = "normalized",
        routing_block_length: int = 64,
        shared_expert_intermediate_size: int = 0,
        expert_intermediate_size: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (
            ("FFN_type", FFN_type, ("softmoe_v3", "raw")),
            ("mlp_type", mlp_type, ("senet", "raw")),
            ("hidden_act", hidden_act, ("silu",)),
            ("routing_mode", routing_mode, tuple(ROUTING_MODES)),
            ("routing_mix", routing_mix, ("normalized", "raw")),
            ("tie_word_embeddings", tie_word_embeddings, (False, True)),
        ):
            if value not in allowed:
                raise ValueError(f"SteelConfig.{name} is {value!r}; it must be one of {allowed}")
        num_key_value_heads = num_key_value_heads or num_attention_heads
        for size, divisor, what in (
            (hidden_size, num_attention_heads, "hidden_size by num_attention_heads"),
            (num_attention_heads, num_key_value_heads, "num_attention_heads by num_key_value_heads"),
        ):
            if size % divisor:
                raise ValueError(f"SteelConfig: {size} is not divisible by {divisor} ({what})")
        if routing_block_length < 1:
            raise ValueError(f"SteelConfig.routing_block_length is {routing_block_length}; it must be at least 1")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.mlp_div_ratio = mlp_div_ratio
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        # transformers 5 writes the base as one of the rope_parameters, older ones a scaling beside it.
        rope = kwargs.get("rope_parameters") or kwargs.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"SteelConfig: the rotary embedding is of type {rope_type!r}; it must be 'default'")
        self.rope_theta = float(rope.get("rope_theta", rope_theta))
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.FFN_type = FFN_type
        self.mlp_type = mlp_type
        self.n_experts = n_experts
        self.slots_per_expert = slots_per_expert
        self.routing_mode = routing_mode
        self.routing_mix = routing_mix
        self.routing_block_length = routing_block_length
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.expert_intermediate_size = expert_intermediate_size
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @property
    def inner_size(self) -> int:
        """Inner width of one expert, or of the dense network."""
        return self.expert_intermediate_size or self.intermediate_size // self.mlp_div_ratio

    @property
    def has_running_sums(self) -> bool:
        """Whether decoding keeps sums over the tokens so far, out of which none can be taken again."""
        return self.FFN_type != "raw" and ROUTING_MODES[self.routing_mode].running_sums

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override] # transformers reads it from the class too
        """How transformers' tensor parallelism cuts the projections. Routing and norms are on every process, and so are
        the experts of ``merged``, which mixes their whole matrices."""
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        plan["layers.*.self_attn.o_proj"] = "rowwise"
        networks = ["mlp"] if self.FFN_type == "raw" else ["mlp.experts.*"] if self.routing_mode != "merged" else []
        if self.FFN_type != "raw" and self.shared_expert_intermediate_size:
            networks.append("mlp.shared_expert")
        up, down = (
            (("gate_up", "up"), ("gate_down", "down")) if self.mlp_type == "senet" else (("gate", "up"), ("down",))
        )
        for network in networks:
            plan |= {f"layers.*.{network}.{name}_proj": "colwise" for name in up}
            plan |= {f"layers.*.{network}.{name}_proj": "rowwise" for name in down}
        return plan

    @property
    def routes_causally(self) -> bool:
        """Whether no token's output depends on a later token. (Attention is causal in every mode; transformers would
        read an ``is_causal`` here as its own.)"""
        return self.FFN_type == "raw" or ROUTING_MODES[self.routing_mode].causal
