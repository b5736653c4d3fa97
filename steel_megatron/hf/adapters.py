"""Adapters of a checkpoint in peft's format, to be loaded on the exported model that they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from steel_megatron.config import ModelConfig
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import write_json
from steel_megatron.model.lora import A, B, adapter_names, is_adapter, split_rows

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint_info import CheckpointInfo
    from steel_megatron.train.checkpoint_tensors import TensorFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapters(
    folder: Path, info: CheckpointInfo, files: TensorFiles, dtype: torch.dtype | None
) -> mapping.Tensors:
    """Write what peft's ``PeftModel.from_pretrained(base, folder)`` reads.

    Args:
        folder: to write to.
        info: the checkpoint.
        files: its own tensors.
        dtype: of the adapters; None keeps theirs.

    Returns:
        the adapters by peft's names.
    """
    own = {
        name: files.read(name, ((0,) * len(facts.shape), facts.shape)).to(dtype or facts.dtype)
        for name, facts in files.tensors.items()
        if is_adapter(name) and not name.startswith("optimizer.")
    }
    tensors = published_adapters(own, info.model)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": info.lora.rank,
        "lora_alpha": info.lora.alpha,
        "lora_dropout": info.lora.dropout,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),  # ...q_proj.lora_A.weight
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
    return tensors


def published_adapters(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> mapping.Tensors:
    """A and B of every published matrix, by the names that peft gives them.

    Args:
        tensors: adapters of all layers, by their names in checkpoints.
        model: the settings.
    """
    found: mapping.Tensors = {}
    for rule in mapping.rules(model):
        factors = adapter_names(rule.key)
        if factors[0] not in tensors:
            continue
        for layer, names in enumerate(mapping.names_of(rule, model)):
            parts = (_of_each(tensors[name][layer], rule.key, model) for name in factors)
            for name, a, b in zip(names, *parts, strict=True):
                prefix = f"base_model.model.{name.removesuffix('weight')}"
                found |= {f"{prefix}{A}.weight": a.contiguous(), f"{prefix}{B}.weight": b.contiguous()}
    return found


def _of_each(part: torch.Tensor, key: str, model: ModelConfig) -> list[torch.Tensor]:
    """A or B of a layer, cut into those of its published matrices."""
    if key.endswith("linear_qkv.weight"):
        if part.dim() == 3:
            return list(part)
        return [
            rows.flatten(0, 1)
            for rows in split_rows(part, model.num_attention_heads // model.query_groups, model.head_dim)
        ]
    return [part] if part.dim() == 2 else list(part.flatten(0, 1))
