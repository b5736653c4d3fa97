"""What the manifest of a checkpoint says, read without torch.

A right checksum says that a file is what was written, not who wrote it. All of this is checked before anything is
loaded, so that a resume may still take an older checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from steel_megatron.config import LoraConfig, ModelConfig, from_dict, refuse_unknown_routing_code
from steel_megatron.data.strict_json import Rule, from_json, or_null, whole
from steel_megatron.errors import CheckpointError, ConfigError, DataError, SteelError
from steel_megatron.train.checkpoint_info import Base, CheckpointInfo

FORMAT, FORMAT_OF_ADAPTERS = 2, 3
_READABLE = (1, 2, 3)
"""Formats that can be read; the first one has SHA-256 of each file, the last one adapters in place of a model."""
MANIFEST = "steel.json"
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


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Over everything that a manifest says, but for the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_info(path: Path) -> CheckpointInfo:
    """Read and check a checkpoint's manifest and the sizes of its files.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        ConfigError: its routing mode is code that has not been imported.
    """
    manifest = read_manifest(path)
    base = manifest.get("base")
    for name, facts in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            there = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(f"{file} {there}; the checkpoint was saved with {facts['bytes']:,} bytes of it")
    refuse_unknown_routing_code(manifest["model"].get("routing_mode"), str(path / MANIFEST))
    return CheckpointInfo(
        path=path,
        step=manifest["step"],
        consumed_samples=manifest["consumed_samples"],
        model=_settings_of(ModelConfig, manifest["model"], path / MANIFEST),
        layout=manifest["layout"],
        world_size=manifest["world_size"],
        has_optimizer=manifest["has_optimizer"],
        # Checkpoints of earlier versions do not say it, and always do.
        has_main_weights=manifest["has_optimizer"]
        if manifest.get("has_main_weights") is None
        else manifest["has_main_weights"],
        data_fingerprint=manifest["data_fingerprint"],
        lora=_settings_of(LoraConfig, manifest.get("lora") or {}, path / MANIFEST),
        base=Base(Path(base["path"]), base["sha256"]) if base else None,
    )


def _settings_of(kind: type, values: Mapping[str, Any], path: Path) -> Any:
    try:
        with content_errors(path):
            return from_dict(kind, dict(values), "")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint's ``steel.json`` says, checked as far as it goes without the other files.

    Raises:
        CheckpointError: it is missing, damaged, or of an unknown format.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: its {MANIFEST} cannot be read ({error.strerror}); name a folder step_..."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_checksum(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not the one it was saved with")
    if manifest.get("format") not in _READABLE:
        known = ", ".join(map(str, _READABLE))
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads formats {known}")
    check_manifest(manifest, path / MANIFEST)
    return manifest
