"""Stock architectures of transformers: what a model is exported as, and whose folders can be imported.

Every key of a config.json is mapped, checked or known not to matter; any other is refused, since it may change what
the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.hf.published import config_from_published, why_not_exportable

Shape = tuple[int, ...]
QWEN2, QWEN2_MOE, LLAMA, STEEL = "qwen2", "qwen2_moe", "llama", "steel"
CLASSES = {QWEN2: "Qwen2ForCausalLM", QWEN2_MOE: "Qwen2MoeForCausalLM", STEEL: "SteelForCausalLM"}

_NEUTRAL = frozenset(
    [
        "_name_or_path",
        "architectures",
        "model_type",
        "auto_map",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "return_dict",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "max_window_layers",
        "sliding_window",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "router_aux_loss_coef",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "attn_implementation",
        "_attn_implementation_autoset",
        "torchscript",
        "unsloth_version",
        "task_specific_params",
        "finetuning_task",
        "tokenizer_class",
    ]
)
"""Keys that do not change what a causal language model computes for given token ids."""
_MAPPED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "attention_dropout",
        "tie_word_embeddings",
    ]
)
_STEEL = frozenset(
    [
        "FFN_type",
        "mlp_type",
        "mlp_div_ratio",
        "expert_intermediate_size",
        "n_experts",
        "slots_per_expert",
        "routing_mode",
        "routing_mix",
        "routing_block_length",
        "shared_expert_intermediate_size",
    ]
)
_MOE = frozenset(("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"))
_REQUIRED: dict[str, tuple[Any, str]] = {
    "use_sliding_window": (False, "here every token sees all tokens before it"),
    "attention_bias": (False, "here the output projection of attention has no bias"),
    "qkv_bias": (True, "here attention has biases on queries, keys and values"),
    "mlp_bias": (False, "here feed-forward layers have no biases"),
    "pretraining_tp": (1, "it splits the matrix products"),
    "decoder_sparse_step": (1, "here every layer has experts"),
    "mlp_only_layers": ([], "here every layer has experts"),
    "partial_rotary_factor": (1.0, "here the rotary embedding turns whole heads"),
}
"""Keys with the one value that this library computes, and why."""


@dataclass(frozen=True)
class Source:
    """What a folder's config.json says.

    Attributes:
        architecture: the kind of model.
        model: its settings here.
        tied: whether the output matrix is the embedding, which is stored once.
        has_biases: whether queries, keys and values have biases; without, they begin at zero here.
    """

    architecture: str
    model: ModelConfig
    tied: bool = False
    has_biases: bool = True


def architecture_for(model: ModelConfig) -> tuple[str, str | None]:
    """What a model is exported as: a stock architecture where that computes exactly the model.

    Args:
        model: the settings.

    Returns:
        The architecture, and for Steel's own the reason why it is no stock one.

    Raises:
        CheckpointError: there is none.
    """
    computing = next(iter(model.megatron_computing.items()), None)
    if model.ffn in ("dense", "top_k_moe") and computing is None and model.ffn_activation == "swiglu":
        return (QWEN2 if model.ffn == "dense" else QWEN2_MOE), None
    if computing is not None and model.ffn == "top_k_moe":
        name, value = computing
        raise CheckpointError(f"{CLASSES[QWEN2_MOE]} does not know model.megatron.{name} = {value!r}")
    lacks = why_not_exportable(model)
    if lacks is not None:
        raise CheckpointError(lacks)
    if model.ffn == "dense":
        return STEEL, f"no stock architecture computes ffn_activation = {model.ffn_activation}"
    return STEEL, "no stock architecture has Soft-MoE layers"


def stock_config(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """The settings under the keys of a stock architecture."""
    config: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.sequence_length,
        "rope_theta": float(model.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": model.attention_dropout,
    }
    if architecture == QWEN2_MOE:
        config |= {
            "moe_intermediate_size": model.ffn_hidden_size,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.moe_top_k,
            # Of the best one alone, the probability among all experts counts (steel_megatron.model.top_k_moe).
            "norm_topk_prob": model.moe_top_k > 1,
            "shared_expert_intermediate_size": 0,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def constant_shapes(model: ModelConfig, architecture: str) -> dict[str, Shape]:
    """Tensors of a stock architecture that the model does not have, by name; they are zero, or hold nothing."""
    if architecture != QWEN2_MOE:
        return {}
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {"gate_proj": (0, hidden), "up_proj": (0, hidden), "down_proj": (hidden, 0)}
    layers = [f"model.layers.{layer}.mlp" for layer in range(model.num_layers)]
    empty = {f"{layer}.shared_expert.{name}.weight": shape for layer in layers for name, shape in shapes.items()}
    return empty | {f"{layer}.shared_expert_gate.weight": (1, hidden) for layer in layers}


def read_source(config: Mapping[str, Any], origin: str) -> Source:
    """The settings of a model of Steel's, Qwen2's or Llama's family.

    Args:
        config: what its config.json holds.
        origin: where that came from, for the message.

    Raises:
        CheckpointError: the model is of another family, a key is missing, or one changes what the model computes and
            is not supported.
    """
    kind = STEEL if "FFN_type" in config else config.get("model_type")  # published models call themselves qwen2
    if kind not in (STEEL, QWEN2, QWEN2_MOE, LLAMA):
        raise CheckpointError(
            f"{origin}: model_type is {kind!r}; this library reads {STEEL}, {QWEN2}, {QWEN2_MOE} and {LLAMA}"
        )
    _refuse_unknown(config, kind, origin)
    tied = bool(config.get("tie_word_embeddings", False))
    if kind == STEEL:
        return Source(kind, config_from_published(config, origin), tied=tied)
    # The rest is what a dense model with SwiGLU says in the words of Steel's configuration.
    defaults = {"rope_theta": 10000.0} if kind == LLAMA else {}
    moe = kind == QWEN2_MOE
    plain = ModelConfig(ffn="dense")
    steel = {"FFN_type": "raw", "mlp_type": "raw", "mlp_div_ratio": 1, "routing_mix": plain.slot_input}
    steel |= {"n_experts": plain.num_experts, "slots_per_expert": plain.slots_per_expert}
    words = {**defaults, **config, **steel}
    if moe:
        words["intermediate_size"] = config.get("moe_intermediate_size")
    model = config_from_published(words, origin)
    try:
        model = replace(model, attention_dropout=config.get("attention_dropout") or 0.0)
        if moe:
            model = _with_experts(model, config, origin)
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    return Source(kind, model, tied=tied, has_biases=kind != LLAMA)


def config_from_hf(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """The settings alone of :func:`read_source`, which has arguments and errors.

    Args:
        config: what its config.json holds.
        origin: where that came from, for the message.
    """
    return read_source(config, origin).model


def _with_experts(model: ModelConfig, config: Mapping[str, Any], origin: str) -> ModelConfig:
    if config.get("shared_expert_intermediate_size") != 0:
        raise CheckpointError(
            f"{origin}: shared_expert_intermediate_size is {config.get('shared_expert_intermediate_size')!r}; "
            "top_k_moe has no shared expert"
        )
    top_k, experts = config.get("num_experts_per_tok"), config.get("num_experts")
    for key, value in (("num_experts_per_tok", top_k), ("num_experts", experts)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{origin}: {key} is {value!r}; it must be a whole number")
    assert top_k is not None and experts is not None
    if config.get("norm_topk_prob") is not (top_k != 1):
        raise CheckpointError(
            f"{origin}: norm_topk_prob is {config.get('norm_topk_prob')!r}; here the probabilities of several experts "
            "make up 1, and that of a single one is among all"
        )
    return replace(model, ffn="top_k_moe", num_experts=experts, moe_top_k=top_k)


def _refuse_unknown(config: Mapping[str, Any], kind: str, origin: str) -> None:
    for key, (value, why) in _REQUIRED.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(f"{origin}: {key} is {json.dumps(config[key])}; {why}")
    sizes = config.get("hidden_size"), config.get("num_attention_heads")
    head = config.get("head_dim")
    if head is not None and all(isinstance(size, int) and size for size in sizes) and head * sizes[1] != sizes[0]:
        raise CheckpointError(
            f"{origin}: head_dim is {head!r}; here it is hidden_size / num_attention_heads, {sizes[0]} / {sizes[1]}"
        )
    types = config.get("layer_types") or []
    if not isinstance(types, list) or any(one != "full_attention" for one in types):
        raise CheckpointError(f"{origin}: layer_types is {types!r}; here every layer is full_attention")
    _check_rotary(config, origin)
    known = _NEUTRAL | _MAPPED | _REQUIRED.keys() | {"head_dim", "layer_types"}
    known |= _STEEL if kind == STEEL else _MOE | {"shared_expert_intermediate_size"} if kind == QWEN2_MOE else set()
    for key in sorted(config.keys() - known):
        if config[key] not in (None, False):  # a feature that is off
            raise CheckpointError(
                f"{origin}: {key} is {config[key]!r}; this library does not know the key, and it may change what the "
                "model computes. If it does not, remove it from a copy of the file"
            )


def _check_rotary(config: Mapping[str, Any], origin: str) -> None:
    """The base is read elsewhere; here, that nothing else is said."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{origin}: the rotary embedding is of type {kind!r} ({key}); this library has 'default'"
            )
        plain = {"rope_type", "type", "rope_theta"}
        if rope.get("partial_rotary_factor") in (1, None):
            plain |= {"partial_rotary_factor"}
        for name in sorted(rope.keys() - plain):
            raise CheckpointError(f"{origin}: {key} has {name} = {rope[name]!r}, which this library lacks")
