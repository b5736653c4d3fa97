"""A trained model as a module: from a checkpoint, or from an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steel_megatron.errors import CheckpointError
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import is_exported, read_config, read_weights
from steel_megatron.parallel.topology import alone
from steel_megatron.platform import prepare

if TYPE_CHECKING:
    from steel_megatron.hf.modeling_steel import SteelForCausalLM
    from steel_megatron.train.checkpoint_info import CheckpointInfo


def read_checkpoint(path: Path, refusal: Callable[[str], str]) -> tuple[CheckpointInfo, dict[str, torch.Tensor]]:
    """A checkpoint and its weights under the published names.

    Args:
        path: the checkpoint's folder.
        refusal: makes the message from what the exported model code lacks to compute the model.

    Raises:
        CheckpointError: it is not complete, or the exported model code cannot compute the model.
        ConfigError: the launch has more than one process.
    """
    prepare()  # before megatron-core is imported
    from steel_megatron.train import checkpoint

    info = checkpoint.read_info(path)
    lacks = mapping.why_not_exportable(info.model)
    if lacks is not None:
        raise CheckpointError(refusal(lacks))
    checkpoint.verify(path)
    with alone("a conversion"):
        own = checkpoint.read_tensors(info, [rule.key for rule in mapping.rules(info.model)])
    return info, mapping.to_hf(own, info.model)


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
        path: a checkpoint's folder (``step_...``) or an exported Hugging Face folder.

    Returns:
        the model on the CPU, in evaluation mode, in the type that its weights have there.

    Raises:
        CheckpointError: the folder is neither, is damaged, or holds a model that the exported code does not compute.
        ConfigError: the launch has more than one process.
    """
    from steel_megatron.hf.configuration_steel import SteelConfig
    from steel_megatron.hf.modeling_steel import SteelForCausalLM

    path = Path(path)
    if is_exported(path):
        settings = mapping.config_from_hf(read_config(path), str(path / "config.json"))
        lacks = mapping.why_not_exportable(settings)
        if lacks is not None:
            raise CheckpointError(f"{path}: {lacks}; load it with transformers' AutoModelForCausalLM")
        weights = read_weights(path)
        mapping.check_tensors(weights, settings, str(path))
    else:
        info, weights = read_checkpoint(path, partial(_refusal, path))
        settings = info.model
    # Without transformers' own loading, which fills what is missing with random numbers.
    model: Any = SteelForCausalLM(SteelConfig(**mapping.config_to_hf(settings)))
    model.to(dtype=weights["lm_head.weight"].dtype).load_state_dict(weights)
    ready: SteelForCausalLM = model.eval()
    return ready
