"""One table between the library's tensors and the published names, read in both directions.

The library's checkpoints hold each kind of weight once, with the layers as its first axis; a Hugging Face folder
holds a tensor per layer, expert and matrix. Legend of shapes: L layers, d hidden size, H heads of size h in G groups,
E experts with P slots each, I inner width of an expert, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steel_megatron.config import Activation, FeedForward, ModelConfig
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.hf.configuration_steel import ROUTING_MODES

Tensors = dict[str, torch.Tensor]
FFN_TYPES: dict[str, FeedForward] = {"softmoe_v3": "soft_moe", "raw": "dense"}
MLP_TYPES: dict[str, Activation] = {"senet": "double_swiglu", "raw": "swiglu"}
PUBLISHED_MODE = "sequence"
"""What the published weights were trained with; their config.json does not say."""


@dataclass(frozen=True)
class Rule:
    """How one tensor of the library becomes tensors under published names.

    Attributes:
        key: its name in checkpoints; with ``layers``, one slice along the first axis is meant below.
        shape: its shape (of one slice).
        names: the published names, with ``{layer}`` for the layer's number.
        split: cuts it into the published tensors, in the order of ``names``.
        join: the inverse.
    """

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    split: Callable[[torch.Tensor], list[torch.Tensor]]
    join: Callable[[list[torch.Tensor]], torch.Tensor]

    @property
    def per_layer(self) -> bool:
        """Whether the tensor has the layers as its first axis."""
        return "{layer}" in self.names[0]


def _same(key: str, shape: tuple[int, ...], name: str) -> Rule:
    return Rule(key, shape, (name,), lambda tensor: [tensor], lambda parts: parts[0])


def _padded(key: str, model: ModelConfig, name: str) -> Rule:
    """[padded V, d]: the rows over the vocabulary's size are zero and are not published."""
    rows, padding = model.vocab_size, model.padded_vocab_size - model.vocab_size
    return Rule(
        key,
        (model.padded_vocab_size, model.hidden_size),
        (name,),
        lambda tensor: [tensor[:rows]],
        lambda parts: torch.nn.functional.pad(parts[0], (0, 0, 0, padding)),
    )


def _attention_inputs(kind: str, model: ModelConfig) -> Rule:
    """megatron-core's rows go by group: the queries of its H / G heads, its key, its value."""
    groups, size = model.query_groups, model.head_dim
    queries = model.num_attention_heads // groups
    tail = (model.hidden_size,) if kind == "weight" else ()

    def split(tensor: torch.Tensor) -> list[torch.Tensor]:
        by_group = tensor.view(groups, queries + 2, size, *tail)
        return [part.reshape(-1, *tail) for part in by_group.split([queries, 1, 1], dim=1)]

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.view(groups, -1, size, *tail) for part in parts], dim=1).reshape(-1, *tail)

    names = tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}" for part in "qkv")
    return Rule(
        f"decoder.layers.self_attention.linear_qkv.{kind}", (groups * (queries + 2) * size, *tail), names, split, join
    )


def _networks(key: str, prefixes: list[str], matrices: tuple[str, ...], shape: tuple[int, int]) -> Rule:
    """[E, matrices, ...]: the matrices on one way through the networks called ``prefixes``."""
    experts, count = len(prefixes), len(matrices)
    return Rule(
        key,
        (experts, count, *shape),
        tuple(f"{prefix}.{matrix}.weight" for prefix in prefixes for matrix in matrices),
        lambda tensor: list(tensor.flatten(0, 1)),
        lambda parts: torch.stack(parts).view(experts, count, *shape),
    )


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


def _feed_forward(key: str, prefixes: list[str], inner: int, model: ModelConfig) -> list[Rule]:
    double = model.ffn_activation == "double_swiglu"
    up = ("gate_up_proj", "up_proj") if double else ("gate_proj", "up_proj")
    down = ("gate_down_proj", "down_proj") if double else ("down_proj",)
    return [
        _networks(f"{key}.up", prefixes, up, (inner, model.hidden_size)),
        _networks(f"{key}.down", prefixes, down, (model.hidden_size, inner)),
    ]


def rules(model: ModelConfig) -> list[Rule]:
    """The table of a model with ``ffn: soft_moe`` or ``dense``."""
    assert model.ffn in FFN_TYPES.values()
    hidden, layers, layer = model.hidden_size, "decoder.layers", "model.layers.{layer}"
    table = [
        _padded("embedding.word_embeddings.weight", model, "model.embed_tokens.weight"),
        _padded("output_layer.weight", model, "lm_head.weight"),
        _same("decoder.final_layernorm.weight", (hidden,), "model.norm.weight"),
        _same(f"{layers}.input_layernorm.weight", (hidden,), f"{layer}.input_layernorm.weight"),
        _same(f"{layers}.pre_mlp_layernorm.weight", (hidden,), f"{layer}.post_attention_layernorm.weight"),
        _attention_inputs("weight", model),
        _attention_inputs("bias", model),
        _same(f"{layers}.self_attention.linear_proj.weight", (hidden, hidden), f"{layer}.self_attn.o_proj.weight"),
    ]
    if model.ffn == "dense":
        return table + _feed_forward(f"{layers}.mlp.network", [f"{layer}.mlp"], model.ffn_hidden_size, model)
    experts = [f"{layer}.mlp.experts.{expert}" for expert in range(model.num_experts)]
    table += [
        _same(f"{layers}.mlp.phi", (hidden, model.num_experts, model.slots_per_expert), f"{layer}.mlp.phi"),
        _same(f"{layers}.mlp.scale", (1,), f"{layer}.mlp.scale"),
        *_feed_forward(f"{layers}.mlp.experts", experts, model.ffn_hidden_size, model),
    ]
    if model.shared_expert_intermediate_size:
        shared = [f"{layer}.mlp.shared_expert"]
        inner = model.shared_expert_intermediate_size
        table += _feed_forward(f"{layers}.mlp.shared_expert.network", shared, inner, model)
    return table


def to_hf(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> Tensors:
    """Tensors of a checkpoint under the published names.

    Raises:
        CheckpointError: a tensor is missing or has another shape than these settings say.
    """
    published: Tensors = {}
    for rule in rules(model):
        shape = (model.num_layers, *rule.shape) if rule.per_layer else rule.shape
        if rule.key not in tensors:
            raise CheckpointError(f"the checkpoint has no tensor {rule.key}; its settings need it")
        whole = tensors[rule.key]
        if tuple(whole.shape) != shape:
            raise CheckpointError(
                f"the checkpoint's {rule.key} has shape {list(whole.shape)}; its settings say {list(shape)}"
            )
        for layer, one in enumerate(whole.unbind(0) if rule.per_layer else (whole,)):
            for name, part in zip(rule.names, rule.split(one), strict=True):
                published[name.format(layer=layer)] = part.contiguous()
    return published


def published_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every published tensor's name and shape."""
    stacked = {
        rule.key: torch.empty((model.num_layers, *rule.shape) if rule.per_layer else rule.shape, device="meta")
        for rule in rules(model)
    }
    return {name: tuple(tensor.shape) for name, tensor in to_hf(stacked, model).items()}


def check_tensors(tensors: Mapping[str, torch.Tensor], model: ModelConfig, origin: str) -> None:
    """Make sure that published tensors are those of a model.

    Args:
        tensors: by published name.
        model: the settings they belong to.
        origin: where they came from, for the message.

    Raises:
        CheckpointError: a tensor is missing, has another shape, belongs to no model of these settings, or has another
            type than those it is merged with.
    """
    shapes = published_shapes(model)
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{origin} has no tensor {name}; these settings need it with shape {list(shape)}")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{origin}: {name} has shape {list(tensors[name].shape)}; its settings say {list(shape)}"
            )
    unexpected = sorted(set(tensors) - set(shapes))
    if unexpected:
        raise CheckpointError(f"{origin} has a tensor {unexpected[0]}, which no model with its settings has")
    for rule in rules(model):
        _check_one_type(tensors, [name for of_layer in _names(rule, model) for name in of_layer], origin)


def from_hf(tensors: Mapping[str, torch.Tensor], model: ModelConfig, origin: str) -> Tensors:
    """Published tensors as the library keeps them.

    Args:
        tensors: by published name.
        model: the settings they belong to.
        origin: where they came from, for the message.

    Returns:
        Tensors by the library's names; those of the layers are stacked, [layers, ...].

    Raises:
        CheckpointError: the tensors are not those of the model, as in :func:`check_tensors`.
    """
    check_tensors(tensors, model, origin)
    own: Tensors = {}
    for rule in rules(model):
        slices = [rule.join([tensors[name] for name in of_layer]) for of_layer in _names(rule, model)]
        own[rule.key] = torch.stack(slices) if rule.per_layer else slices[0]
    return own


def _names(rule: Rule, model: ModelConfig) -> list[list[str]]:
    """The published names behind a rule's tensor, layer by layer."""
    layers = range(model.num_layers) if rule.per_layer else (0,)
    return [[name.format(layer=layer) for name in rule.names] for layer in layers]


def _check_one_type(tensors: Mapping[str, torch.Tensor], names: list[str], origin: str) -> None:
    """Tensors that become one must have one type: torch would widen some of them."""
    first, *others = names
    for name in others:
        if tensors[name].dtype != tensors[first].dtype:
            raise CheckpointError(
                f"{origin}: {name} is {_type_name(tensors[name])}, {first} is {_type_name(tensors[first])}; "
                "weights of one kind must have one type over all layers and experts"
            )


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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


def config_from_hf(config: Mapping[str, Any], origin: str) -> ModelConfig:
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
    for key, why in (
        ("tie_word_embeddings", "Steel models have two embedding matrices"),
        ("use_sliding_window", "here every token sees all tokens before it"),
    ):
        if config.get(key, False):
            raise CheckpointError(f"{origin}: {key} is true; {why}")
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
