"""Reading model folders, and making new ones under a temporary name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.files import replace_folder
from steel_megatron.hf import mapping
from steel_megatron.hf.architectures import constant_shapes, read_source
from steel_megatron.hf.paths import read_config
from steel_megatron.hf.weights import check_finite, stored_tensors
from steel_megatron.log import progress


class ModelFolder:
    """A model's folder, of which every tensor is accounted for; tensors are read one at a time.

    Args:
        folder: with config.json and safetensors files.

    Attributes:
        config: its config.json.
        source: what that says.

    Raises:
        CheckpointError: the folder's settings or tensors are not those of a model that this library has.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = read_config(folder)
        self.source = read_source(self.config, str(folder / "config.json"))
        self._shapes = mapping.published_shapes(self.source.model)
        self._stored = stored_tensors(folder)
        constant = constant_shapes(self.source.model, self.source.architecture)
        expected = {name: shape for name, shape in self._shapes.items() if not self._is_made(name)} | constant
        found = {name: one.shape for name, one in self._stored.items() if not self._is_other(name)}
        mapping.check_shapes(found, expected, str(folder))
        for name, shape in constant.items():
            if 0 not in shape and self._stored[name].read().count_nonzero():
                raise CheckpointError(f"{folder}: {name} is not zero, and here there is no such tensor")

    @property
    def model(self) -> ModelConfig:
        """Its settings."""
        return self.source.model

    @property
    def count(self) -> int:
        """Stored tensors."""
        return len(self._stored)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a published tensor."""
        if self._is_bias(name):
            name = name.removesuffix("bias") + "weight"
        return self._stored[self._place(name)].dtype

    def read(self, name: str) -> torch.Tensor:
        """A published tensor, also where the folder's architecture has none: a zero bias, the tied output matrix.

        Raises:
            CheckpointError: it cannot be read, or holds values that are not finite.
        """
        if self._is_bias(name):
            return torch.zeros(self._shapes[name], dtype=self.dtype(name))
        tensor = self._stored[self._place(name)].read()
        check_finite(name, tensor, self._folder)
        return tensor

    def _is_made(self, name: str) -> bool:
        return self._is_bias(name) or self._place(name) != name

    def _is_bias(self, name: str) -> bool:
        return not self.source.has_biases and name.endswith("_proj.bias")

    def _place(self, name: str) -> str:
        tied = name == "lm_head.weight" and self.source.tied
        return "model.embed_tokens.weight" if tied else name

    @staticmethod
    def _is_other(name: str) -> bool:
        """Frequencies of the rotary embedding, which old versions of transformers stored and new ones compute."""
        return name.endswith("rotary_emb.inv_freq")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, by published name.

    Raises:
        CheckpointError: the folder's settings or tensors are not those of a model that this library has.
    """
    opened = ModelFolder(folder)
    names = list(mapping.published_shapes(opened.model))
    tensors: dict[str, torch.Tensor] = {}
    with progress("reading weights", len(names), "tensors") as bar:
        for name in names:
            tensors[name] = opened.read(name)
            bar.advance(1)
    return tensors


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own, synced, when the block ends well and vanishes otherwise.

    Args:
        output: its name at the end.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be made.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {output}: {error}; no partial output was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
