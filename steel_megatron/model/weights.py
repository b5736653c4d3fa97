"""A stage's weights by global name, and initial values that do not depend on how the model is cut.

Every parameter is drawn whole from a generator seeded by the run's seed and the parameter's global name, and each
process keeps its own part. So one process, TP2 and PP2 start from the very same numbers, and a comparison of
layouts compares layouts.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from steel_megatron.config import ModelConfig
from steel_megatron.model.lora import initial_bound, is_adapter

SHARDS = "shards"
"""Attribute of a stage whose weights are sharded over data-parallel processes: this process's shards, by name."""


def sharded_weights(*chunks: GPTModel) -> dict[str, ShardedTensor]:
    """A process's weights and their place in the whole model, by a name of its own.

    megatron-core also lists empty pickled objects (the state of transformer-engine's modules); they are left out, so
    that checkpoints hold tensors only.

    Args:
        chunks: the process's model chunks; the names of several begin with the chunk's number.
    """
    return {
        name if len(chunks) == 1 else f"{number}.{name}": one
        for number, chunk in enumerate(chunks)
        for name, one in _of_chunk(chunk).items()
        if isinstance(one, ShardedTensor)
    }


def _of_chunk(chunk: GPTModel) -> dict[str, object]:
    return dict(chunk.__dict__[SHARDS] if SHARDS in chunk.__dict__ else chunk.sharded_state_dict())


def storable(weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Weights as torch's checkpoints take them: parts that may be uneven have all axes of the whole tensor."""
    return {name: one if one.has_regular_grid else _with_all_axes(one) for name, one in weights.items()}


def _with_all_axes(one: ShardedTensor) -> ShardedTensor:
    shape = (1,) * one.prepend_axis_num + tuple(one.local_shape)
    return replace(one, data=one.data.detach().view(shape), local_shape=shape, prepend_axis_num=0)


def initialize_weights(stage: GPTModel, model: ModelConfig, seed: int) -> None:
    """Set the weights of this process's part of the model.

    Matrices are normal with standard deviation ``init_method_std`` (the published model's way: no scaling by depth)
    or, in experts, ``expert_init_method_std``; norms are 1, the routing scale is ``routing_scale_init``, biases are 0.
    ``phi`` is only used by its direction. Rows of the padded vocabulary are 0. With ``identical_expert_init`` all
    experts of a layer get the first one's. Adapters begin as peft's do, and add nothing.

    Args:
        stage: this process's part of the model.
        model: the settings, with the deviations.
        seed: the run's; the same on all processes.
    """
    with torch.no_grad():
        for name, sharded in sharded_weights(stage).items():
            _fill(sharded, name, model, seed)


def _fill(sharded: ShardedTensor, name: str, model: ModelConfig, seed: int) -> None:
    weight = sharded.data
    if name.endswith("mlp.scale"):
        weight.fill_(model.routing_scale_init)
        return
    if sharded.key.endswith("norm.weight"):
        weight.fill_(1.0)
        return
    if name.endswith(".bias"):
        weight.zero_()
        return
    prepended = sharded.prepend_axis_num
    label = f"{seed}/{sharded.key}/{','.join(map(str, sharded.global_offset[:prepended]))}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") >> 1
    )
    std = model.init_method_std
    if model.expert_init_method_std is not None and (".mlp.experts." in name or ".mlp.network." in name):
        std = model.expert_init_method_std
    whole = torch.empty(sharded.global_shape[prepended:])
    if is_adapter(name):
        bound = initial_bound(name, whole.shape)
        whole.uniform_(-bound, bound, generator=generator)
    else:
        whole.normal_(0.0, std, generator=generator)
    if model.identical_expert_init and not is_adapter(name) and ".mlp.experts." in name:
        whole[1:] = whole[0].clone()
    if whole.size(0) == model.padded_vocab_size and not is_adapter(name):
        whole[model.vocab_size :] = 0.0
    own = zip(sharded.global_offset[prepended:], sharded.local_shape, strict=True)
    weight.copy_(whole[tuple(slice(start, start + size) for start, size in own)])
