"""Weights in safetensors files, read and written one tensor at a time.

The safetensors library checks a file's header. It maps whole files into memory, and writes only what is all in memory;
a conversion shall need no more of it than its largest tensors, so the bytes are read and written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from steel_megatron.errors import CheckpointError
from steel_megatron.files import begin_sync

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types of weights, by their names in safetensors files."""
CHUNK = 1 << 22
"""Elements that are looked at together."""
ALIGNMENT = 8
"""Of the header's length, as safetensors has it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: the file.
        start: of its bytes in the file.
        shape: its axes.
        dtype: of its elements.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor in memory of its own.

        Raises:
            CheckpointError: the file ends before it does, or cannot be read.
        """
        return self._read(self.start, self.shape)

    def read_rows(self, start: int, count: int) -> torch.Tensor:
        """Some rows along the first axis, in memory of their own.

        Args:
            start: the first one.
            count: how many.

        Raises:
            CheckpointError: the file ends before they do, or cannot be read.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.start + start * row, (count, *self.shape[1:]))

    def _read(self, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                _read_into(file, start, tensor)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return tensor


def _read_into(file: Any, start: int, tensor: torch.Tensor) -> None:
    content = memoryview(cast(Any, tensor.flatten().view(torch.uint8).numpy()))
    file.seek(start)
    while content:
        count = file.readinto(content)
        if not count:
            raise CheckpointError(f"{file.name} ends within a tensor")
        content = content[count:]


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files: those that its index names, or the only one.

    Raises:
        CheckpointError: the index is damaged, or a file is missing.
    """
    index = folder / INDEX
    named = list(read_index(folder).values()) if index.is_file() else []
    files = [folder / name for name in sorted(set(named) or {SINGLE})]
    missing = [path.name for path in files if not path.is_file()]
    if missing and index.is_file():
        raise CheckpointError(f"{index} names {missing[0]}, which is not there")
    if missing:
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        hint = (
            "; {} is a pickle, which can execute anything and is not read: if you trust it, load the folder once with "
            "transformers' from_pretrained and write it anew with save_pretrained, which makes safetensors"
        )
        raise CheckpointError(
            f"{folder} has neither {missing[0]} nor {INDEX}{hint.format(pickled[0]) if pickled else ''}"
        )
    return files


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, as the folder's index says.

    Raises:
        CheckpointError: the index is damaged, or names a file of another folder.
    """
    index = folder / INDEX
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = list(named.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not an index of safetensors files") from None
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; it must name files of its own folder")
    return dict(named)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What a model's folder holds, by published name; no tensor is read.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is there twice or of a type that weights do not have,
            or the index and the files disagree.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in _header(path):
            if name in found:
                raise CheckpointError(f"{path} holds {name} a second time; another file of its folder has it too")
            found[name] = tensor
    if (folder / INDEX).is_file():
        for name, file in read_index(folder).items():
            if name not in found or found[name].path.name != file:
                raise CheckpointError(f"{folder / INDEX} says that {name} is in {file}, which does not hold it")
    return found


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt"):  # it checks that tensors fill the file and do not overlap
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # what a crafted header asks of torch
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    for name, one in header.items():
        if name == "__metadata__":
            continue
        if one["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of type {one['dtype']}; weights must be float32, bfloat16 or float16"
            )
        yield name, StoredTensor(path, 8 + length + one["data_offsets"][0], tuple(one["shape"]), DTYPES[one["dtype"]])


def check_finite(name: str, tensor: torch.Tensor, origin: object) -> None:
    """Raise a CheckpointError if a tensor holds values that are not finite.

    Args:
        name: of the tensor.
        tensor: of any shape.
        origin: where it came from, for the message.
    """
    # The extremes are not finite if any value is not, and in bfloat16 they cost a tenth of a norm.
    for part in tensor.flatten().split(CHUNK) if tensor.numel() else ():
        if not torch.stack(part.aminmax()).isfinite().all():
            raise CheckpointError(f"{origin}: {name} holds values that are not finite")


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        shape: its axes.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, planned: Mapping[str, Planned], tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    """Write one safetensors file, or several with an index when one would be too large; the caller syncs them.

    Args:
        folder: it must be there.
        planned: every tensor by name, in the order in which they come.
        tensors: the tensors in that order; none is kept.
        max_shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.

    Raises:
        CheckpointError: a tensor is not the one that was planned.
        OSError: the disk is full.
    """
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, one in planned.items():
        if shards[-1] and size + one.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = one
        size += one.nbytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    rest = iter(tensors)
    for file, shard in zip(files if len(shards) > 1 else [SINGLE], shards, strict=True):
        _write_file(folder / file, shard, rest)
    left = next(rest, None)
    if left is not None:
        raise CheckpointError(f"{left[0]} was not planned")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(one.nbytes for one in planned.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, planned: Mapping[str, Planned], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in planned.items():
        header[name] = {
            "dtype": names[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    syncing = 0
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, one in planned.items():
            came, tensor = next(tensors, (None, torch.empty(0)))
            if came != name or tuple(tensor.shape) != one.shape or tensor.dtype != one.dtype:
                raise CheckpointError(
                    f"{came} with shape {list(tensor.shape)}, {tensor.dtype}, came where {name} with shape "
                    f"{list(one.shape)}, {one.dtype}, was planned"
                )
            file.write(cast(Any, tensor.detach().contiguous().flatten().view(torch.uint8).numpy()))
            del tensor  # or it would lie in memory next to the one after it
            syncing = begin_sync(file, syncing)
