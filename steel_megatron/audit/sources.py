"""What can be audited: settings that were read, and weights that are read later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonargparse
import torch
import yaml
from megatron.core.models.gpt import GPTModel

from steel_megatron.audit.report import Kind
from steel_megatron.config import ModelConfig, from_dict, load_yaml
from steel_megatron.errors import CheckpointError, ConfigError
from steel_megatron.files import disk_errors
from steel_megatron.hf.convert import read_config, read_weights
from steel_megatron.hf.mapping import (
    Tensors,
    check_tensors,
    config_from_hf,
    published_shapes,
    rules,
    to_hf,
    why_not_exportable,
)
from steel_megatron.model.megatron_fields import without_ineffective_fields
from steel_megatron.model.weights import initialize_weights
from steel_megatron.train import checkpoint
from steel_megatron.train.model_path import find_model


@dataclass(frozen=True)
class Subject:
    """What is audited: settings that were read, and weights that were not yet.

    Attributes:
        kind: what it is.
        model: its settings.
        load: its weights under the published names; for models that have such.
        fill: puts its weights into a whole stage; for the others.
    """

    kind: Kind
    model: ModelConfig
    load: Callable[[], Tensors]
    fill: Callable[[GPTModel], None]


def open_subject(path: Path, seed: int) -> Subject:
    """Read the settings of a folder or file, but no weights yet.

    Args:
        path: a run's folder, a checkpoint's, a Hugging Face folder, or a YAML file.
        seed: of random weights, where the file has settings alone.

    Raises:
        CheckpointError: the folder is neither kind of model.
        ConfigError: the file does not hold the settings of a model.
    """
    if path.is_file():
        model = _read_settings(path)
        unscaled = dataclasses.replace(model, init_method_std=model.hidden_size**-0.5)
        return Subject(
            "settings",
            model,
            load=lambda: _random_weights(model, seed),
            fill=lambda stage: initialize_weights(stage, unscaled, seed),
        )
    found = find_model(path)
    path, info = found.path, found.info
    if info is None:
        model = config_from_hf(read_config(path), str(path / "config.json"))
        lacks = why_not_exportable(model)
        if lacks is not None:
            raise CheckpointError(f"{path}: {lacks}; audit the checkpoint that it was made of, or import-hf makes")

        def load() -> Tensors:
            weights = read_weights(path)
            check_tensors(weights, model, str(path))
            return weights

        return Subject("Hugging Face folder", model, load, fill=_never)
    model = without_ineffective_fields(info.model)

    def load_checkpoint() -> Tensors:
        checkpoint.verify(path)
        return to_hf(checkpoint.read_tensors(info, [rule.key for rule in rules(info.model)]), info.model)

    def fill(stage: GPTModel) -> None:
        checkpoint.verify(path)
        checkpoint.load_weights(stage, info, model)

    return Subject("checkpoint", model, load_checkpoint, fill)


def _never(stage: GPTModel) -> None:
    raise AssertionError("every Hugging Face folder has an exported form")


def _read_settings(path: Path) -> ModelConfig:
    """The model of a YAML file that holds a run's settings, or a model's alone."""
    with disk_errors("read", path, ConfigError):
        content = path.read_bytes()
    try:
        values = load_yaml(content.decode("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is neither a model's folder nor YAML: {' '.join(str(error).split())}") from None
    values = values.get("model", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the settings of a run or a model; it holds {type(values).__name__}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, None)
    try:
        return from_dict(ModelConfig, parser.parse_object(values).as_dict(), "")
    except Exception as error:  # what the parser makes of keys that are no names, or of deep nesting
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _random_weights(model: ModelConfig, seed: int) -> Tensors:
    """Weights for settings that have none: so large that every layer changes what passes through it.

    With the initial weights of a training run the experts give next to nothing (their output is a product of up to
    four small numbers), and what leaks through them would be taken for rounding. Here every product of a matrix with
    a vector of the size that it gets keeps that size, and routing is decided: its logits have a deviation of 4.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(model).items():
        drawn = torch.empty(shape).normal_(generator=generator)
        if name.endswith("norm.weight"):
            drawn.fill_(1.0)
        elif name.endswith("mlp.scale"):
            drawn.fill_(4 * math.sqrt(model.hidden_size))
        elif name.endswith(".bias"):
            drawn.zero_()
        elif name.endswith("_proj.weight") or name == "lm_head.weight":
            # What enters routed experts has length 1 where routing mixes normalized tokens; all else has entries of 1.
            reads_unit = ".experts." in name and "down_proj" not in name and model.slot_input == "normalized"
            drawn /= 1.0 if reads_unit else math.sqrt(shape[1])
        weights[name] = drawn
    return weights
