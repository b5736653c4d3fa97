"""Parts of a checkpoint's tensors, read from its files without a model, and no more than is asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.utils import _create_file_view

from steel_megatron.errors import CheckpointError
from steel_megatron.train.checkpoint_index import read_index
from steel_megatron.train.checkpoint_manifest import content_errors
from steel_megatron.train.checkpoint_reader import BYTES, stored_layout

PIECE = 1 << 22
"""Most elements of a tensor that are read at once by those who need no more: 32 MiB in float64."""

RANDOM = "random."
"""Before the name of a random state, which has a row for each process and is no part of the model."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along the axes of a tensor."""


@dataclass(frozen=True)
class TensorFacts:
    """What an index says of a tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        boxes: the parts that it was saved in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


class TensorFiles:
    """The tensors of a checkpoint that was verified.

    Args:
        folder: the checkpoint's.

    Attributes:
        tensors: what there is, by name.

    Raises:
        CheckpointError: its index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = read_index(folder / ".metadata")
        with content_errors(folder / ".metadata"):
            self.tensors = {
                name: TensorFacts(
                    tuple(tensor.size),
                    tensor.properties.dtype,
                    tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks),
                )
                for name, tensor in index.state_dict_metadata.items()
            }
            self._places = {(one.fqn, tuple(one.offset)): place for one, place in index.storage_data.items()}
        self._maps: dict[str, np.ndarray] = {}
        self._starts: dict[tuple[str, tuple[int, ...]], int] = {}  # of elements in the file, of each box looked at

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a tensor, whatever parts it was saved in.

        Args:
            name: of the tensor.
            box: the part; of a tensor without axes, ``((), ())``.

        Returns:
            the part, in the tensor's type and the shape of the box.

        Raises:
            CheckpointError: its files do not hold all of it.
        """
        facts = self.tensors[name]
        found = torch.empty(box[1], dtype=facts.dtype)
        missing = found.numel()
        for saved in facts.boxes:
            common = _overlap(box, saved)
            if common is None:
                continue
            for piece in _cut(common):
                self._copy_saved(name, saved, piece, found[_within(piece, box)])
            missing -= math.prod(common[1])
        if missing:
            raise CheckpointError(
                f"{self._folder} lacks {missing:,} of {found.numel():,} elements of {name} at {box[0]}"
            )
        return found

    def pieces(self, name: str) -> Iterator[Box]:
        """The boxes that a tensor was saved in, cut along the first axes where they have more than :data:`PIECE`."""
        for box in self.tensors[name].boxes:
            yield from _cut(box)

    def _copy_saved(self, name: str, saved: Box, piece: Box, target: torch.Tensor) -> None:
        """Copy a part of a box as it was saved; the rest of the box is not read, and no page stays mapped."""
        place, dtype, sizes = self._places[name, saved[0]], self.tensors[name].dtype, saved[1]
        path = self._folder / place.relative_path
        inside, size = _within(piece, saved), math.prod(sizes) * dtype.itemsize
        with content_errors(path):
            if (name, saved[0]) not in self._starts:
                with path.open("rb") as file:
                    view: Any = _create_file_view(file, place.offset, place.length)
                    archive: Any = torch._C.PyTorchFileReader(view)
                    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
                    if stored_layout(archive) != (0, sizes, strides) or archive.get_record_size(BYTES) != size:
                        view.seek(0)
                        target.copy_(torch.load(view, map_location="cpu", weights_only=True).view(sizes)[inside])
                        return
                    self._starts[name, saved[0]] = place.offset + archive.get_record_offset(BYTES)
            if place.relative_path not in self._maps:
                self._maps[place.relative_path] = np.memmap(path, dtype=np.uint8, mode="r")
            whole, start = self._maps[place.relative_path], self._starts[name, saved[0]]
            # As bytes, because an element may begin at any byte of the file.
            elements = whole[start : start + size].reshape(*sizes, dtype.itemsize)
            np.copyto(target.unsqueeze(-1).view(torch.uint8).numpy(), elements[inside])
            whole._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common."""
    begins = tuple(max(pair) for pair in zip(a[0], b[0], strict=True))
    ends = (min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return (begins, sizes) if all(size > 0 for size in sizes) else None


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """A box as slices of one around it."""
    places = zip(box[0], box[1], outer[0], strict=True)
    return tuple(slice(begin - start, begin - start + size) for begin, size, start in places)


def _cut(box: Box) -> Iterator[Box]:
    """Boxes of at most :data:`PIECE` elements that make up one; rows of the last axis stay whole."""
    offsets, sizes = box
    axis = next((axis for axis, size in enumerate(sizes) if size > 1), None)
    if math.prod(sizes) <= PIECE or axis is None:
        yield box
        return
    rows = max(1, PIECE // math.prod(sizes[axis + 1 :]))
    for begin in range(0, sizes[axis], rows):
        count = min(rows, sizes[axis] - begin)
        part = (
            (*offsets[:axis], offsets[axis] + begin, *offsets[axis + 1 :]),
            (*sizes[:axis], count, *sizes[axis + 1 :]),
        )
        yield from _cut(part) if count > 1 or math.prod(part[1]) > PIECE else (part,)
