"""Hugging Face folders to checkpoints, in one process, a tensor at a time.

Everything is checked before the checkpoint gets its name: every tensor is accounted for, and the library computes from
the checkpoint what transformers computes from the folder.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.files import exclusive_lock
from steel_megatron.hf import mapping
from steel_megatron.hf.folder import ModelFolder, partial_folder, write_json
from steel_megatron.hf.paths import REPORT, check_output
from steel_megatron.hf.upcycling import UpcycledFolder, Upcycling
from steel_megatron.log import get_logger
from steel_megatron.parallel.topology import Topology, alone
from steel_megatron.platform import prepare
from steel_megatron.train.checkpoint_manifest import MANIFEST

if TYPE_CHECKING:
    from steel_megatron.train.checkpoint_stream import Part

logger = get_logger(__name__)


class _Weights(Protocol):
    """Published tensors, of which one is read at a time."""

    @property
    def model(self) -> ModelConfig: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


def import_hf(folder: Path, output: Path, *, overwrite: bool = False, upcycling: Upcycling | None = None) -> Path:
    """Turn a model's folder into a checkpoint with weights only, to start a run from.

    Args:
        folder: with config.json and safetensors files, of Steel's, Qwen2's or Llama's family.
        output: the checkpoint to make; it appears only when it is complete.
        overwrite: whether an earlier one of that name may be replaced.
        upcycling: what a dense model becomes; None to leave it as it is.

    Raises:
        CheckpointError: the folder's settings or tensors are not those of a model that this library has, a weight is
            not finite, both sides give other logits, or the checkpoint cannot be written.
        ConfigError: the launch has more than one process, or there is no such mixture of experts.
    """
    folder, output = folder.resolve(), output.resolve()
    opened = ModelFolder(folder)
    weights: _Weights = opened
    if upcycling is not None:
        weights = UpcycledFolder(opened, upcycling.model(opened.model, str(folder)), upcycling.seed)
    check_output(output, overwrite, folder, (MANIFEST,))

    prepare()  # before megatron-core is imported
    with alone("a conversion") as topology, exclusive_lock(output, CheckpointError):
        check_output(output, overwrite, folder, (MANIFEST,))  # another job may have been faster
        with partial_folder(output) as made:
            _write(made, weights, opened, upcycling, topology, folder)
    tell_of_changes(opened, upcycling)
    logger.info(f"imported {opened.count} tensors, {_numbers(weights.model):,} numbers, to {output}")
    return output


def tell_of_changes(opened: ModelFolder, upcycling: Upcycling | None = None) -> None:
    """Say in the log what of a model becomes otherwise in training.

    Args:
        opened: the model.
        upcycling: what it becomes; None if it stays what it is.
    """
    if opened.source.tied:
        logger.warning(
            "the folder's output matrix is its embedding; the checkpoint has two equal matrices, which training will "
            "make different"
        )
    if not opened.source.has_biases:
        logger.warning("attention gets biases on queries, keys and values, which are zero until they are trained")
    if upcycling is not None and not upcycling.is_exact:
        how = f"moe_top_k = {upcycling.moe_top_k}" if upcycling.to == "top_k_moe" else f"routing mode {upcycling.to}"
        logger.warning(f"with {how}, the model does not begin with the dense model's logits")


def _numbers(model: ModelConfig) -> int:
    return sum(map(math.prod, mapping.published_shapes(model).values()))


def _write(
    made: Path, weights: _Weights, opened: ModelFolder, upcycling: Upcycling | None, topology: Topology, folder: Path
) -> None:
    from steel_megatron.hf import compare
    from steel_megatron.train.checkpoint_stream import finish, write_tensors
    from steel_megatron.train.checkpoint_tensors import TensorFiles

    try:
        written = write_tensors(made, parts_of(weights, str(folder)))
    except RuntimeError as error:  # torch's of a full disk
        raise OSError(str(error).splitlines()[-1]) from error
    report: dict[str, Any] = {
        "source": str(folder),
        "architecture": opened.source.architecture,
        "tensors": opened.count,
        "numbers": _numbers(weights.model),
        "tied_embeddings_copied": opened.source.tied,
        "biases_added_as_zeros": not opened.source.has_biases,
        "upcycled": vars(upcycling) if upcycling else None,
        "logits": None,
    }
    if upcycling is None or upcycling.is_exact:
        tokens = compare.fixed_tokens(weights.model)
        ours = compare.checkpoint_logits(TensorFiles(made), weights.model, topology, tokens)
        agreement = compare.compare(ours, compare.folder_logits(folder, opened.config, tokens))
        agreement.check(f"{folder} and the checkpoint made of it")
        report["logits"] = agreement.to_dict()
    write_json(made / REPORT, report)
    finish(made, written, weights.model)


def parts_of(weights: _Weights, origin: str) -> list[Part]:
    """The tensors of a checkpoint, layer by layer, each made of published ones when it is wanted.

    Args:
        weights: the published ones.
        origin: where they came from, for the message.

    Raises:
        CheckpointError: tensors that become one have several types.
    """
    from steel_megatron.train.checkpoint_stream import Part

    model, parts = weights.model, []
    for rule in mapping.rules(model):
        by_layer = mapping.names_of(rule, model)
        types = {name: weights.dtype(name) for names in by_layer for name in names}
        mapping.check_one_type(types, origin)
        dtype = next(iter(types.values()))
        for layer, names in enumerate(by_layer):
            make = partial(_make, rule, weights, names)
            begin = (0,) * len(rule.shape)
            if rule.per_layer:
                shape, box = (model.num_layers, *rule.shape), ((layer, *begin), (1, *rule.shape))
            else:
                shape, box = rule.shape, (begin, rule.shape)
            parts.append(Part(rule.key, shape, dtype, box, make))
    return parts


def _make(rule: mapping.Rule, weights: _Weights, names: list[str]) -> torch.Tensor:
    one = rule.join([weights.read(name) for name in names])
    return one.unsqueeze(0) if rule.per_layer else one
