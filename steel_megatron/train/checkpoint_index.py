"""Makes sure that reading what torch and megatron-core keep of a checkpoint executes nothing: an index is a pickle."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from steel_megatron.errors import CheckpointError
from steel_megatron.train.checkpoint_manifest import BACKENDS, content_errors

_METADATA = ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
_PLANNER = ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "uint8", "int64", "int32")
# Whole names, for a pickle may ask for the `os.system` of any module that imports os.
ALLOWED = frozenset(
    {
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in _METADATA),
        *(f"torch.distributed.checkpoint.planner.{name}" for name in _PLANNER),
        *(f"torch.{name}" for name in _DTYPES),
    }
)


class _IndexChecker(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ALLOWED or "." in name:
            raise CheckpointError(
                f"{self.path} asks for {module}.{name}, which no checkpoint of this library does; not loaded"
            )
        return super().find_class(module, name)


def read_index(path: Path) -> Any:
    """Read an index with nothing but the names that a checkpoint of tensors is made of.

    Returns:
        what the pickle holds; not necessarily an index.

    Raises:
        CheckpointError: it asks for something else, or cannot be read.
    """
    try:
        return _IndexChecker(io.BytesIO(path.read_bytes()), path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a pickle may make any of the allowed classes raise anything
        raise CheckpointError(f"{path} is no index of a checkpoint: {type(error).__name__}: {error}") from None


def check_metadata(folder: Path, tensors: Collection[str]) -> None:
    """Read the index of a checkpoint and what megatron-core expects next to it, without executing anything.

    Args:
        folder: the checkpoint.
        tensors: names that the index must have.

    Raises:
        CheckpointError: one of the files is not what the library writes.
    """
    _check_index(read_index(folder / ".metadata"), folder, tensors)
    path = folder / "metadata.json"
    with content_errors(path):
        backends = json.loads(path.read_text(encoding="utf-8"))
    if backends != BACKENDS:
        raise CheckpointError(f"{path} names the backends {str(backends)[:80]}; they must be {BACKENDS}")
    path = folder / "common.pt"
    with content_errors(path):
        common = torch.load(path, map_location="cpu", weights_only=True)
    if common != {}:
        raise CheckpointError(f"{path} holds {str(common)[:80]!r}; the library writes an empty dictionary")


def _check_index(index: object, folder: Path, tensors: Collection[str]) -> None:
    """An index of tensors that are in the folder's files, and not larger than these."""
    path = folder / ".metadata"
    with content_errors(path):
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
            raise CheckpointError(f"{path} is no index of a checkpoint, but holds a {type(index).__name__}")
        names = {info.relative_path for info in index.storage_data.values()}
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{path} names the file {name!r}, which is not in its folder")
        missing = sorted(set(tensors) - set(index.state_dict_metadata))
        if missing:
            raise CheckpointError(f"{path} does not list {missing[0]}, which the checkpoint was saved with")
        room = sum((folder / name).stat().st_size for name in names)
        for name, tensor in index.state_dict_metadata.items():
            if not isinstance(name, str) or not isinstance(tensor, TensorStorageMetadata):
                raise CheckpointError(f"{path} says of {name!r} that it is a {type(tensor).__name__}, not a tensor")
            needed = math.prod(tensor.size) * tensor.properties.dtype.itemsize
            if needed > room:
                raise CheckpointError(
                    f"{path} says that {name} has the shape {list(tensor.size)}, {needed:,} bytes; all files together "
                    f"have {room:,}"
                )
