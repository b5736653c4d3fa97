"""Writes a checkpoint with weights only, from tensors that are made one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from steel_megatron.config import ModelConfig
from steel_megatron.train.checkpoint_save import model_facts, write_manifest, write_settings
from steel_megatron.train.checkpoint_tensors import Box
from steel_megatron.train.checkpoint_writer import FILES, Written, write_file, write_index


@dataclass(frozen=True)
class Part:
    """A part of a tensor that will be written.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor.
        dtype: of its elements.
        box: the part.
        make: gives the part, in the shape of the box; called once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    make: Callable[[], torch.Tensor]


def write_tensors(folder: Path, parts: Sequence[Part]) -> Written:
    """Write the tensors of a checkpoint and their index; one part is in memory at a time, and nothing is synced.

    Args:
        folder: the checkpoint's, under its temporary name.
        parts: all parts of all tensors.

    Raises:
        OSError, RuntimeError: the disk is full.
        CheckpointError: a tensor is not finite.
    """
    indices = _numbered(parts)
    written = Written()
    for number, share in enumerate(_shares(parts)):
        tensors = ((indices[id(part)], part.make()) for part in share)
        written.add(write_file(folder / f"__0_{number}.distcp", tensors, sync=False))
    write_index(folder, _index(parts), written)
    return written


def finish(folder: Path, written: Written, model: ModelConfig) -> None:
    """Write what a checkpoint at step 0 has besides its tensors; every other file must be there.

    Args:
        folder: the checkpoint's, under its temporary name.
        written: from :func:`write_tensors`.
        model: the model's settings.

    Raises:
        OSError: the disk is full, or a file is not there as it was written.
    """
    write_settings(folder, {}, {})
    facts = {"layout": "TP1 PP1 EP1 DP1", "has_optimizer": False, "has_main_weights": False}
    write_manifest(folder, {**model_facts(model, 0, 0), **facts, "world_size": 1}, written)


def _shares(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Consecutive parts for each file, of about as many bytes, since files are read at the same time."""
    sizes = [math.prod(part.box[1]) * part.dtype.itemsize for part in parts]
    half, taken, begin = -(-sum(sizes) // FILES), 0, 0
    for end, size in enumerate(sizes, start=1):
        taken += size
        if taken >= half or end == len(parts):
            yield parts[begin:end]
            taken, begin = 0, end


def _numbered(parts: Sequence[Part]) -> dict[int, MetadataIndex]:
    """The place of each part in the index, by its identity: its number among the parts of its tensor."""
    counts: dict[str, int] = {}
    found = {}
    for part in parts:
        number = counts.get(part.name, 0)
        counts[part.name] = number + 1
        found[id(part)] = MetadataIndex(part.name, torch.Size(part.box[0]), number)
    return found


def _index(parts: Sequence[Part]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    for part in parts:
        whole = tensors.setdefault(
            part.name, TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(part.shape), [])
        )
        whole.chunks.append(ChunkStorageMetadata(torch.Size(part.box[0]), torch.Size(part.box[1])))
    return Metadata(state_dict_metadata=dict(tensors))
