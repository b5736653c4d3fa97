"""Makes sure that reading torch's index of a checkpoint, which is a pickle, executes nothing."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from steel_megatron.errors import CheckpointError

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
