"""A trained model as a module: from a checkpoint, or from an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.config.parallel import check_layout
from steel_megatron.errors import CheckpointError
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import read_weights
from steel_megatron.hf.paths import read_config
from steel_megatron.parallel.agreement import first_process_bytes, raise_if_any_rank_failed
from steel_megatron.parallel.topology import Topology, alone
from steel_megatron.platform import prepare
from steel_megatron.train.model_path import find_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from steel_megatron.hf.modeling_steel import SteelForCausalLM
    from steel_megatron.train.checkpoint_info import CheckpointInfo


def read_checkpoint(info: CheckpointInfo, refusal: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under the published names.

    Args:
        info: the checkpoint.
        refusal: makes the message from what the exported model code lacks to compute the model.

    Raises:
        CheckpointError: it is not complete, or the exported model code cannot compute the model.
        ConfigError: the launch has more than one process.
    """
    prepare()  # before megatron-core is imported
    from steel_megatron.train import checkpoint

    lacks = mapping.why_not_exportable(info.model)
    if lacks is not None:
        raise CheckpointError(refusal(lacks))
    checkpoint.verify(info.path)
    with alone("a conversion"):
        own = checkpoint.read_tensors(info, [rule.key for rule in mapping.rules(info.model)])
    return mapping.to_hf(own, info.model)


def _refusal(path: Path, lacks: str) -> str:
    return (
        f"{path} cannot be loaded as a transformers model: {lacks}. steel-megatron generate and audit run this "
        "checkpoint on the library's own model"
    )


def load_model(path: str | Path) -> SteelForCausalLM:
    """A trained model, ready to be evaluated or finetuned outside the library's own training.

    It is transformers' kind of model, with the exported code: ``model(input_ids=...)`` gives ``.logits`` [B, T, V],
    ``model.generate(...)`` continues texts.

    Args:
        path: a run's folder, whose newest checkpoint is taken, a checkpoint's (``step_...``) or an exported one.

    Returns:
        the model on the CPU, in evaluation mode, in the type that its weights have there.

    Raises:
        CheckpointError: it is none of these, is damaged, or holds a model that the exported code does not compute.
        ConfigError: the launch has more than one process.
    """
    from steel_megatron.hf.configuration_steel import SteelConfig
    from steel_megatron.hf.modeling_steel import SteelForCausalLM

    found = find_model(path)
    path = found.path
    if found.info is None:
        settings = mapping.config_from_hf(read_config(path), str(path / "config.json"))
        lacks = mapping.why_not_exportable(settings)
        if lacks is not None:
            raise CheckpointError(f"{path}: {lacks}; load it with transformers' AutoModelForCausalLM")
        weights = read_weights(path)
        mapping.check_tensors(weights, settings, str(path))
    else:
        settings, weights = found.info.model, read_checkpoint(found.info, partial(_refusal, path))
    # Without transformers' own loading, which fills what is missing with random numbers.
    model: Any = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(settings)))
    model.to(dtype=weights["lm_head.weight"].dtype).load_state_dict(weights)
    ready: SteelForCausalLM = model.eval()
    return ready


def load_parts(info: CheckpointInfo, topology: Topology) -> tuple[list[GPTModel], ModelConfig]:
    """This process's parts of a checkpoint's model, in evaluation mode; every process of the launch calls it.

    Args:
        info: the checkpoint, saved under any layout.
        topology: the process groups.

    Returns:
        the parts, and the settings that they were built with.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the model cannot be cut in this way.
    """
    from steel_megatron.model.megatron_fields import without_ineffective_fields
    from steel_megatron.model.spec import build_chunks
    from steel_megatron.train import checkpoint
    from steel_megatron.train.checkpoint_checksums import verified_by_all

    # A run that still trains may have saved another newest checkpoint between two processes' looks.
    chosen = Path(first_process_bytes(str(info.path).encode()).decode())
    if chosen != info.path:
        info = checkpoint.read_info(chosen)
    verified_by_all(lambda check: check(info.path), checkpoint.verify)
    raise_if_any_rank_failed(lambda: _check_shapes(info))
    check_layout(info.model, topology.parallel)
    model = without_ineffective_fields(info.model)
    chunks = build_chunks(model, topology)
    for chunk in chunks:
        checkpoint.load_weights(chunk, info, model)
        chunk.eval()
    return chunks, model


def _check_shapes(info: CheckpointInfo) -> None:
    """Compare a checkpoint's tensors with its settings, before a model of these takes memory.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    from steel_megatron.train import checkpoint

    shapes = checkpoint.tensor_shapes(info)
    if info.model.ffn in mapping.FFN_TYPES.values():
        mapping.to_hf({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, info.model)
        return
    name, wanted = "embedding.word_embeddings.weight", (info.model.padded_vocab_size, info.model.hidden_size)
    if shapes.get(name) != wanted:
        raise CheckpointError(f"{info.path}: {name} has shape {shapes.get(name)}; its settings say {wanted}")
