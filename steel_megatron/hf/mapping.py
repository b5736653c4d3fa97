"""One table between the library's tensors and the published names, read in both directions.

The library's checkpoints hold each kind of weight once, with the layers as its first axis; a Hugging Face folder
holds a tensor per layer, expert and matrix. Legend of shapes: L layers, d hidden size, H heads of size h in G groups,
E experts with P slots each, I inner width of an expert, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.hf.architectures import Shape, config_from_hf
from steel_megatron.hf.published import FFN_TYPES, PUBLISHED_MODE, config_to_hf, why_not_exportable

__all__ = [
    "FFN_TYPES",
    "PUBLISHED_MODE",
    "Rule",
    "Shape",
    "Tensors",
    "check_one_type",
    "check_shapes",
    "check_tensors",
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "names_of",
    "published_shapes",
    "rules",
    "to_hf",
    "type_name",
    "why_not_exportable",
]

Tensors = dict[str, torch.Tensor]


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
        lambda parts: torch.nn.functional.pad(parts[0], (0, 0, 0, padding)) if padding else parts[0],
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


def _feed_forward(key: str, prefixes: list[str], inner: int, model: ModelConfig) -> list[Rule]:
    double = model.ffn_activation == "double_swiglu"
    up = ("gate_up_proj", "up_proj") if double else ("gate_proj", "up_proj")
    down = ("gate_down_proj", "down_proj") if double else ("down_proj",)
    return [
        _networks(f"{key}.up", prefixes, up, (inner, model.hidden_size)),
        _networks(f"{key}.down", prefixes, down, (model.hidden_size, inner)),
    ]


def _top_k_experts(layer: str, model: ModelConfig) -> list[Rule]:
    """megatron-core's router and experts; an up projection has the rows of the gate and then those of the value."""
    inner, hidden, key = model.ffn_hidden_size, model.hidden_size, "decoder.layers.mlp"
    table = [_same(f"{key}.router.weight", (model.num_experts, hidden), f"{layer}.mlp.gate.weight")]
    for expert in range(model.num_experts):
        ours, theirs = f"{key}.experts.local_experts.{expert}", f"{layer}.mlp.experts.{expert}"
        names = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
        table += [
            Rule(
                f"{ours}.linear_fc1.weight", (2 * inner, hidden), names, lambda tensor: list(tensor.chunk(2)), torch.cat
            ),
            _same(f"{ours}.linear_fc2.weight", (hidden, inner), f"{theirs}.down_proj.weight"),
        ]
    return table


def rules(model: ModelConfig) -> list[Rule]:
    """The table of a model with ``ffn: soft_moe``, ``dense`` or ``top_k_moe``."""
    assert model.ffn != "none"
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
    if model.ffn == "top_k_moe":
        return table + _top_k_experts(layer, model)
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
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, origin)
    for rule in rules(model):
        names = [name for of_layer in names_of(rule, model) for name in of_layer]
        check_one_type({name: tensors[name].dtype for name in names}, origin)


def check_shapes(found: Mapping[str, Shape], shapes: Mapping[str, Shape], origin: str) -> None:
    """Make sure that every tensor is accounted for.

    Args:
        found: shapes by name.
        shapes: what there must be, by name.
        origin: where they came from, for the message.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to no model of these settings.
    """
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{origin} has no tensor {name}; these settings need it with shape {list(shape)}")
        if found[name] != shape:
            raise CheckpointError(f"{origin}: {name} has shape {list(found[name])}; its settings say {list(shape)}")
    unexpected = sorted(set(found) - set(shapes))
    if unexpected:
        raise CheckpointError(f"{origin} has a tensor {unexpected[0]}, which no model with its settings has")


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
        slices = [rule.join([tensors[name] for name in of_layer]) for of_layer in names_of(rule, model)]
        own[rule.key] = torch.stack(slices) if rule.per_layer else slices[0]
    return own


def names_of(rule: Rule, model: ModelConfig) -> list[list[str]]:
    """The published names behind a rule's tensor, layer by layer."""
    layers = range(model.num_layers) if rule.per_layer else (0,)
    return [[name.format(layer=layer) for name in rule.names] for layer in layers]


def check_one_type(types: Mapping[str, torch.dtype], origin: str) -> None:
    """Make sure that tensors that become one have one type: torch would widen some of them.

    Args:
        types: by name.
        origin: where they came from, for the message.

    Raises:
        CheckpointError: they have several.
    """
    first, *others = types
    for name in others:
        if types[name] != types[first]:
            raise CheckpointError(
                f"{origin}: {name} is {type_name(types[name])}, {first} is {type_name(types[first])}; "
                "weights of one kind must have one type over all layers and experts"
            )


def type_name(dtype: torch.dtype) -> str:
    """A type as config.json names it."""
    return str(dtype).removeprefix("torch.")
