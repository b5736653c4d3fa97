"""What the small files of a checkpoint must hold: its manifest, and what megatron-core expects next to the tensors.

A right checksum says that a file is what was written, not who wrote it. All of this is checked before anything is
loaded, so that a resume may still take an older checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from steel_megatron.data.strict_json import Rule, from_json, or_null, whole
from steel_megatron.errors import CheckpointError, DataError, SteelError
from steel_megatron.train.checkpoint_index import read_index

_HEX = re.compile("[0-9a-f]+")


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        name not in ("", ".", "..")
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and isinstance(facts, dict)
        and whole().holds(facts.get("bytes"))
        and any(isinstance(fact, str) and _HEX.fullmatch(fact) for fact in facts.values())
        for name, facts in value.items()
    )


_FILES = Rule(_is_files, "size (bytes) and checksum, in hex, by the names of files of this folder")
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_BASE = Rule(
    lambda value: isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("path", "sha256")),
    "the path and the sha256 of a checkpoint",
)
_MAYBE = or_null(Rule(lambda value: isinstance(value, bool), "true or false"))
_STEP = or_null(Rule(whole().holds, "a step's number"))
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What metadata.json says: megatron-core's format, in the words of 0.16. Newer versions read them, and write others."""


@dataclass(frozen=True)
class _Manifest:
    """The fields that are read; further ones are left alone."""

    step: Annotated[int, whole()]
    consumed_samples: Annotated[int, whole()]
    layout: str
    world_size: Annotated[int, whole(1)]
    has_optimizer: bool
    data_fingerprint: str
    model: Annotated[Mapping[str, Any], _OBJECT]
    files: Annotated[Mapping[str, Any], _FILES]
    has_main_weights: Annotated[bool | None, _MAYBE] = None
    norms: Annotated[Mapping[str, Any], _OBJECT] = field(default_factory=dict)
    resume_from: Annotated[int | None, _STEP] = None
    lora: Annotated[Mapping[str, Any] | None, or_null(_OBJECT)] = None
    base: Annotated[Mapping[str, Any] | None, or_null(_BASE)] = None


@contextmanager
def content_errors(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on content that it does not expect into an error that names the file.

    Raises:
        CheckpointError: the block raised something that is no SteelError.
    """
    try:
        yield
    except SteelError:
        raise
    except Exception as error:  # pickles and archives raise what they like
        lines = str(error).strip().splitlines()
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {lines[0] if lines else ''}") from error


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Check the type and range of each field of a manifest.

    Raises:
        CheckpointError: a field is missing or wrong; the message names it.
    """
    try:
        from_json(_Manifest, manifest, str(path), strict=False)
    except DataError as error:
        raise CheckpointError(str(error)) from None


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
