"""Checkpoints of adapters, read as the models that they make of their base."""

from __future__ import annotations

import torch

from steel_megatron.config import LoraConfig, ModelConfig
from steel_megatron.model.lora import adapter_names, delta_of
from steel_megatron.train.checkpoint_tensors import Box, TensorFacts, TensorFiles


class MergedFiles:
    """The weights of a model with what adapters add to them; to be read like :class:`TensorFiles`.

    Args:
        base: the weights that were adapted.
        adapters: the files with the adapters.
        lora: the adapters' settings.
        model: the model's settings.

    Attributes:
        tensors: what ``base`` has, by name.
        adapters: the files with the adapters.
    """

    def __init__(self, base: WeightFiles, adapters: TensorFiles, lora: LoraConfig, model: ModelConfig) -> None:
        assert lora.rank is not None
        self._base, self._model, self._scale = base, model, lora.alpha / lora.rank
        self.tensors: dict[str, TensorFacts] = base.tensors
        self.adapters = adapters

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a weight, rounded to its type.

        Args: as for :meth:`TensorFiles.read`.
        """
        found = self._base.read(name, box)
        factors = adapter_names(name)
        if factors[0] not in self.adapters.tensors:
            return found
        first, *inside = (slice(start, start + size) for start, size in zip(*box, strict=True))
        for place, layer in enumerate(range(first.start, first.stop)):
            # Of whole layers, so that each part of the product has the same bits however it is cut.
            a, b = (self._read_layer(factor, layer) for factor in factors)
            delta = delta_of(name, a, b, self._model)[tuple(inside)]
            found[place] = (found[place].float() + self._scale * delta).to(found.dtype)
        return found

    def _read_layer(self, name: str, layer: int) -> torch.Tensor:
        shape = self.adapters.tensors[name].shape[1:]
        return self.adapters.read(name, ((layer, *(0 for _ in shape)), (1, *shape)))[0]


WeightFiles = TensorFiles | MergedFiles
