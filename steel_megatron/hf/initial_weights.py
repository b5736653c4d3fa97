"""Runs that start from an exported folder: each process reads what its part of the model needs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from steel_megatron.config import ModelConfig
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import ModelFolder
from steel_megatron.hf.importing import tell_of_changes
from steel_megatron.model.weights import sharded_weights, storable
from steel_megatron.parallel.agreement import first_process_bytes, on_rank0, raise_if_any_rank_failed
from steel_megatron.train.checkpoint_info import check_settings


class ExportedWeights:
    """The weights of an exported folder, as what a run starts from.

    Args:
        path: the folder.

    Raises:
        CheckpointError: its settings or tensors are not those of a model that this library has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = ModelFolder(path)

    def verify(self) -> None:
        """Every tensor has been accounted for; each is checked when it is read."""
        tell_of_changes(self._folder)

    def fingerprint(self) -> str:
        """SHA-256 of the settings and the weights' files."""

        def digest() -> str:
            found = hashlib.sha256()
            for file in [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]:
                with file.open("rb") as stream:
                    found.update(hashlib.file_digest(stream, "sha256").digest())
            return found.hexdigest()

        return first_process_bytes((on_rank0(digest) or "").encode()).decode()

    def load(self, chunk: GPTModel, model: ModelConfig) -> None:
        """Fill a chunk of a model, whatever its layout.

        Args:
            chunk: this process's part.
            model: the run's settings.

        Raises:
            CheckpointError: they differ from the folder's in what its weights decide, or a weight is not finite.
        """
        raise_if_any_rank_failed(lambda: self._load(chunk, model))

    def _load(self, chunk: GPTModel, model: ModelConfig) -> None:
        check_settings(self._folder.model, model, str(self.path), resumes=False)
        rules = {rule.key: rule for rule in mapping.rules(model)}
        # Parts of one tensor follow each other, so that it is read once.
        own = sorted(storable(sharded_weights(chunk)).values(), key=lambda one: (one.key, one.global_offset))
        read: tuple[tuple[str, int], torch.Tensor] | None = None
        for one in own:
            rule = rules[one.key]
            for layer in range(*_layers_of(one)) if rule.per_layer else (0,):
                if read is None or read[0] != (one.key, layer):
                    names = mapping.names_of(rule, model)[layer]
                    read = (one.key, layer), rule.join([self._folder.read(name) for name in names])
                _copy(read[1], one, layer if rule.per_layer else None)


def _layers_of(one: ShardedTensor) -> tuple[int, int]:
    count = 1 if one.prepend_axis_num else one.local_shape[0]
    return one.global_offset[0], one.global_offset[0] + count


@torch.no_grad()
def _copy(whole: torch.Tensor, one: ShardedTensor, layer: int | None) -> None:
    """A process's part of a whole tensor, or of a layer's, to where it belongs."""
    lacking = one.prepend_axis_num if one.prepend_axis_num else 0
    data, shape, offset = one.data, one.local_shape, one.global_offset[lacking:]
    if layer is not None and not lacking:
        data, shape, offset = data[layer - one.global_offset[0]], shape[1:], offset[1:]
    data.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])
