"""Settings of Steel's own published and exported models, under the keys of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steel_megatron.config import Activation, FeedForward, ModelConfig
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.hf.configuration_steel import ROUTING_MODES

FFN_TYPES: dict[str, FeedForward] = {"softmoe_v3": "soft_moe", "raw": "dense"}
MLP_TYPES: dict[str, Activation] = {"senet": "double_swiglu", "raw": "swiglu"}
PUBLISHED_MODE = "sequence"
"""What the published weights were trained with; their config.json does not say."""


def why_not_exportable(model: ModelConfig) -> str | None:
    """What the exported model code lacks to compute a model; None if it lacks nothing."""
    if model.ffn not in FFN_TYPES.values():
        return f"the exported model code has no ffn = {model.ffn}; it has {' and '.join(FFN_TYPES.values())}"
    if model.routing is not None and model.routing.name not in ROUTING_MODES:
        return (
            f"the exported model code has no routing_mode = {model.routing_mode}; it has {', '.join(ROUTING_MODES)} "
            "(docs/new_routing_mode.md says how to add one)"
        )
    for name, value in model.megatron_computing.items():
        return f"the exported model code does not know model.megatron.{name} = {value!r}"
    return None


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The settings under the published keys, and the routing's under ours.

    Raises:
        CheckpointError: the exported code computes no such model.
    """
    lacks = why_not_exportable(model)
    if lacks is not None:
        raise CheckpointError(f"the model cannot be exported: {lacks}")
    ffn_type = {ours: theirs for theirs, ours in FFN_TYPES.items()}[model.ffn]
    mlp_type = {ours: theirs for theirs, ours in MLP_TYPES.items()}[model.ffn_activation]
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "mlp_div_ratio": 1,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.sequence_length,
        "rope_theta": float(model.rotary_base),
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "FFN_type": ffn_type,
        "mlp_type": mlp_type,
        "n_experts": model.num_experts,
        "slots_per_expert": model.slots_per_expert,
        "routing_mode": PUBLISHED_MODE if model.routing is None else model.routing.name,
        "routing_mix": model.slot_input,
        "routing_block_length": model.block_length,
        "shared_expert_intermediate_size": model.shared_expert_intermediate_size,
    }


def config_from_published(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """Settings of a published or exported model.

    Args:
        config: what its config.json holds.
        origin: where that came from, for the message.

    Raises:
        CheckpointError: a key is missing or has a value that this library has no model for.
    """
    ffn = FFN_TYPES[_known(config, "FFN_type", tuple(FFN_TYPES), origin)]
    activation = MLP_TYPES[_known(config, "mlp_type", tuple(MLP_TYPES), origin)]
    _known(config, "hidden_act", ("silu",), origin, default="silu")
    modes = tuple(ROUTING_MODES)
    try:
        return ModelConfig(
            num_layers=_number(config, "num_hidden_layers", origin),
            hidden_size=_number(config, "hidden_size", origin),
            num_attention_heads=_number(config, "num_attention_heads", origin),
            num_query_groups=None
            if config.get("num_key_value_heads") is None
            else _number(config, "num_key_value_heads", origin),
            ffn=ffn,
            ffn_activation=activation,
            ffn_hidden_size=_inner_size(config, origin),
            num_experts=_number(config, "n_experts", origin),
            slots_per_expert=_number(config, "slots_per_expert", origin),
            routing_mode=None if ffn == "dense" else _known(config, "routing_mode", modes, origin, PUBLISHED_MODE),
            slot_input=config.get("routing_mix", "normalized"),
            block_length=_number(config, "routing_block_length", origin, default=64),
            # A dense network has no shared expert.
            shared_expert_intermediate_size=0
            if ffn == "dense"
            else _number(config, "shared_expert_intermediate_size", origin, default=0),
            vocab_size=_number(config, "vocab_size", origin),
            sequence_length=_number(config, "max_position_embeddings", origin),
            rotary_base=_rotary_base(config, origin),
            norm_epsilon=_number(config, "rms_norm_eps", origin, whole=False),
            init_method_std=_number(config, "initializer_range", origin, default=0.02, whole=False),
        )
    except (ConfigError, OverflowError, TypeError) as error:  # 1e400 is infinite; a list is no key of a table
        raise CheckpointError(f"{origin}: {error}") from None


def _known(config: Mapping[str, Any], key: str, known: tuple[str, ...], origin: str, default: str | None = None) -> str:
    value = config.get(key, default)
    if value not in known:
        raise CheckpointError(f"{origin}: {key} is {value!r}; this library has {', '.join(known)}")
    return value


def _number(
    config: Mapping[str, Any], key: str, origin: str, *, default: float | None = None, whole: bool = True
) -> Any:
    """The number under a key; JSON may write a whole one as 2.0."""
    if key not in config and default is None:
        raise CheckpointError(f"{origin} has no {key}")
    value = config.get(key, default)
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != value // 1):
        raise CheckpointError(f"{origin}: {key} is {value!r}; it must be {kind}")
    return int(value) if whole else float(value)


def _inner_size(config: Mapping[str, Any], origin: str) -> int:
    """Inner width of an expert or of the dense network."""
    if config.get("expert_intermediate_size"):
        return _number(config, "expert_intermediate_size", origin)
    ratio = _number(config, "mlp_div_ratio", origin)
    if ratio < 1:
        raise CheckpointError(f"{origin}: mlp_div_ratio is {ratio}; it must be at least 1")
    return _number(config, "intermediate_size", origin) // ratio


def _rotary_base(config: Mapping[str, Any], origin: str) -> int:
    """Its key is rope_theta, which transformers 5 moves into rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{origin}: rope_parameters is {rope!r}; it must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{origin}: the rotary embedding is of type {kind!r}; this library has 'default'")
    return _number(rope if "rope_theta" in rope else config, "rope_theta", origin)
