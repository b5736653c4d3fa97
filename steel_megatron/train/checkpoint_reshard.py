"""Writes a checkpoint anew as a run under another layout would have saved it, in one process, a part at a time.

Loading does not need it: a checkpoint loads under any layout. But its files hold the parts that its processes had.
Under the layout that saved them, each process verifies and reads its own files from one end to the other; under another
one, it picks parts out of many files.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from steel_megatron.config import RunConfig, dump_yaml
from steel_megatron.errors import CheckpointError
from steel_megatron.files import exclusive_lock, replace_folder
from steel_megatron.train.checkpoint import reason, sharded_engine
from steel_megatron.train.checkpoint_info import CheckpointInfo, check_adapters
from steel_megatron.train.checkpoint_manifest import FORMAT, FORMAT_OF_ADAPTERS, read_info, read_manifest
from steel_megatron.train.checkpoint_plan import check_layout_of, simulated_engine
from steel_megatron.train.checkpoint_save import write_manifest
from steel_megatron.train.checkpoint_tensors import RANDOM, Box, TensorFiles
from steel_megatron.train.checkpoint_writer import FILES, Written, write_file, write_index


@dataclass(frozen=True)
class _Part:
    """A part of a tensor that a process holds."""

    name: str
    box: Box

    @property
    def elements(self) -> int:
        return math.prod(self.box[1])


def reshard(info: CheckpointInfo, output: Path, run: RunConfig, processes: int | None = None) -> CheckpointInfo:
    """Write a checkpoint as a run of another layout would have saved it; all bits of weights and optimizer are kept.

    Args:
        info: the checkpoint, which was verified.
        output: the folder to make; it appears when it is whole.
        run: the settings, with the layout.
        processes: of that layout; None for as many as saved the checkpoint.

    Returns:
        what the new manifest says.

    Raises:
        CheckpointError: the output is there already, the checkpoint is of another model or precision, or the output
            cannot be written.
        ConfigError: the settings and the number of processes do not fit each other.
    """
    world_size = info.world_size if processes is None else processes
    check_layout_of(info, run, world_size)
    check_adapters(info, run.lora)
    source, output = info.path.resolve(), Path(os.path.abspath(output))
    if output.exists():
        raise CheckpointError(f"{output} is already there; choose another name")
    if source in output.parents:
        raise CheckpointError(f"the output {output} lies inside {source}, which it would change; choose another")
    files = TensorFiles(source)
    parts = [_parts(info, run, rank, world_size) for rank in range(world_size)]
    _check_covered(files, parts, source)
    if world_size == info.world_size:  # as many processes: each gets its random states back
        for name in (name for name in files.tensors if name.startswith(RANDOM)):
            for rank, (offsets, sizes) in enumerate(sorted(files.tensors[name].boxes)):
                parts[rank].append(_Part(name, (offsets, sizes)))
    partial = output.with_name(f".{output.name}.partial")
    with exclusive_lock(output, CheckpointError):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            partial.mkdir(parents=True)
            _write(files, parts, partial, info, run, world_size)
            replace_folder(partial, output)
        except (OSError, RuntimeError) as error:  # torch's of a full disk
            raise CheckpointError(f"cannot write {output}: {reason(error)}; nothing was kept") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_info(output)


def _parts(info: CheckpointInfo, run: RunConfig, rank: int, world_size: int) -> list[_Part]:
    """What a rank would save of weights and optimizer."""
    with simulated_engine(run, rank, world_size) as engine:
        state = sharded_engine(engine)
        wanted: list[ShardedTensor] = list(state["model"].values())
        if info.has_optimizer:
            wanted += state["optimizer"].values()
        return [
            _Part(one.key, (tuple(one.global_offset), (1,) * one.prepend_axis_num + tuple(one.local_shape)))
            for one in wanted
            if is_main_replica(one.replica_id)
        ]


def _check_covered(files: TensorFiles, parts: Sequence[Sequence[_Part]], source: Path) -> None:
    """Raise a CheckpointError unless the parts are all of the checkpoint's weights and optimizer, once each."""
    counted: dict[str, int] = {}
    for part in (part for own in parts for part in own):
        counted[part.name] = counted.get(part.name, 0) + part.elements
    there = {name: math.prod(facts.shape) for name, facts in files.tensors.items() if not name.startswith(RANDOM)}
    if counted == there:
        return
    name = min(name for name in {*counted, *there} if counted.get(name) != there.get(name))
    raise CheckpointError(
        f"{source} has {there.get(name, 0):,} elements of {name}, the planned run "
        f"{counted.get(name, 0):,}; only the layout can be changed: leave precision and optimizer as they were"
    )


def _write(
    files: TensorFiles, parts: Sequence[Sequence[_Part]], folder: Path, info: CheckpointInfo, run: RunConfig, world: int
) -> None:
    written, numbers = Written(), _numbered(parts)
    for rank, own in enumerate(parts):
        for number, share in enumerate(_shares(own)):
            tensors = ((numbers[part], files.read(part.name, part.box)) for part in share)
            written.add(write_file(folder / f"__{rank}_{number}.distcp", tensors))
    write_index(folder, _index(files, parts), written)
    manifest = read_manifest(info.path)
    for name in manifest["files"]:
        if not name.endswith(".distcp") and name not in (".metadata", "run.yaml"):
            shutil.copyfile(info.path / name, folder / name)
    (folder / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
    facts = {key: value for key, value in manifest.items() if key not in ("files", "norms", "sha256")}
    number = FORMAT if info.base is None else FORMAT_OF_ADAPTERS
    layout = {"format": number, "layout": run.parallel.describe(world), "world_size": world}
    write_manifest(folder, {**facts, **layout, "has_main_weights": info.has_main_weights}, written)


def _numbered(parts: Sequence[Sequence[_Part]]) -> dict[_Part, MetadataIndex]:
    """The place of each part in the index: its number among the parts of its tensor."""
    counts: dict[str, int] = {}
    found = {}
    for part in (part for own in parts for part in own):
        number = counts.get(part.name, 0)
        counts[part.name] = number + 1
        found[part] = MetadataIndex(part.name, torch.Size(part.box[0]), number)
    return found


def _index(files: TensorFiles, parts: Sequence[Sequence[_Part]]) -> Metadata:
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for part in (part for own in parts for part in own):
        chunk = ChunkStorageMetadata(torch.Size(part.box[0]), torch.Size(part.box[1]))
        chunks.setdefault(part.name, []).append(chunk)
    tensors: dict[str, Any] = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=files.tensors[name].dtype),
            size=torch.Size(files.tensors[name].shape),
            chunks=own,
        )
        for name, own in chunks.items()
    }
    return Metadata(state_dict_metadata=tensors)


def _shares(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """A process's parts over its files, the largest first to the emptiest file, as a save does it."""
    shares: list[list[_Part]] = [[] for _ in range(FILES)]
    sizes = [0] * FILES
    for part in sorted(parts, key=lambda one: one.elements, reverse=True):
        emptiest = sizes.index(min(sizes))
        shares[emptiest].append(part)
        sizes[emptiest] += part.elements
    return (share for share in shares if share)
