"""Writes one process's tensors of a checkpoint, in torch's format, in threads.

No process is started: nothing is left behind when a run is killed, and no lock or socket is inherited. Writing,
hashing and syncing release Python's lock, so training goes on meanwhile.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _split_by_size_and_type, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.utils.serialization import config as serialization

from steel_megatron.errors import CheckpointError
from steel_megatron.files import begin_sync
from steel_megatron.parallel.agreement import any_rank
from steel_megatron.train.checkpoint_checksums import ALGORITHM, checksum_of, new_hash

FILES = 2
"""Files of a process, each written by a thread."""
INDEX = ".metadata"
"""torch's list of which tensor lies where."""
CACHED_BYTES = 1 << 19
"""Hashed and then written while still in the processor's cache."""
_CONVERTED = 1 << 22
"""Elements that are converted together, to compute with them."""


@dataclass
class Written:
    """What a process wrote.

    Attributes:
        files: size and checksum by name.
        places: where each part of a tensor lies.
        squares: the sum of the squared values of each tensor's parts, by the tensor's name.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, other: Written) -> None:
        """Take in what another thread or process wrote."""
        self.files |= other.files
        self.places |= other.places
        for key, square in other.squares.items():
            self.squares[key] = self.squares.get(key, 0.0) + square


class Planner:
    """Who writes what. While the layout of the state stays the same, so does the plan."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._items: list[WriteItem] = []
        self._index: Metadata | None = None

    def plan(self, state: ShardedStateDict) -> tuple[list[tuple[WriteItem, torch.Tensor]], Metadata | None]:
        """Every process calls it.

        Args:
            state: sharded tensors.

        Returns:
            this process's tensors, and on the first process the index of all.
        """
        own = [one for one in nested_values(state) if is_main_replica(one.replica_id)]
        layout = [(one.key, one.global_offset, one.local_shape, one.global_shape, one.dtype) for one in own]
        if any_rank(layout != self._layout or not layout):
            self._items, self._index = _planned(state)
            self._layout = layout
        data = {(one.key, one.global_offset): one.data.detach() for one in own}
        tensors = []
        for item in self._items:
            assert item.index.offset is not None and item.tensor_data is not None
            tensor = data[item.index.fqn, tuple(item.index.offset)]
            tensors.append((item, tensor.reshape(item.tensor_data.chunk.sizes)))
        return tensors, self._index


def _planned(state: ShardedStateDict) -> tuple[list[WriteItem], Metadata | None]:
    own, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    is_rank0 = dist.get_rank() == 0
    planner.set_up_planner(mcore_to_pyt_state_dict(own), is_coordinator=is_rank0)
    local = planner.create_local_plan()
    plans: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(local, plans if is_rank0 else None)
    index = planner.create_global_plan(plans)[1] if is_rank0 else None  # checks that they cover every tensor once
    return local.items, index


class ShardWriter:
    """Writes tensors as files ``__<rank>_<number>.distcp`` of a folder, in threads that begin at once.

    Args:
        folder: it must be there.
        items: what to write.
        tensors: gives them; called by each thread, it may wait. They must stay as they are until all is written.
        others: writes files of another kind, in a thread as well.
        read_back: whether to read each file again from the disk, and compare.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[WriteItem],
        tensors: Callable[[], Mapping[MetadataIndex, torch.Tensor]],
        others: Callable[[], None] | None = None,
        *,
        read_back: bool = False,
    ) -> None:
        self._given_up, self._read_back = threading.Event(), read_back
        self._tensors = tensors
        shares = [share for share in _split_by_size_and_type(FILES, list(items)) if share]
        threads = ThreadPoolExecutor(FILES + 1, "checkpoint")

        def rest() -> Written:
            if others is not None:
                others()
            return Written()

        self._futures: list[Future[Written]] = [
            *(
                threads.submit(self._write, folder / f"__{dist.get_rank()}_{number}.distcp", share)
                for number, share in enumerate(shares)
            ),
            threads.submit(rest),  # the last one, as it does not wait for a copy: this thread has gone on by then
        ]
        threads.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """Whether all is written, or nothing more will be."""
        return all(future.done() for future in self._futures)

    def result(self) -> Written:
        """Wait for the end.

        Raises:
            OSError, RuntimeError: what the first thread that failed met.
            CheckpointError: a tensor is not finite.
        """
        errors = [future.exception() for future in self._futures]  # waits for all
        for error in errors:
            if error is not None:
                raise error
        together = Written()
        for future in self._futures:
            together.add(future.result())
        return together

    def give_up(self) -> None:
        """End soon, with files that nobody will read."""
        self._given_up.set()
        for future in self._futures:
            future.exception()

    def _write(self, path: Path, items: Sequence[WriteItem]) -> Written:
        tensors = self._tensors()

        def wanted() -> Iterator[tuple[MetadataIndex, torch.Tensor]]:
            for item in items:
                if self._given_up.is_set():
                    raise CheckpointError(f"{path} was given up")
                yield item.index, tensors[item.index]

        return write_file(path, wanted(), read_back=self._read_back)


def write_file(
    path: Path,
    tensors: Iterable[tuple[MetadataIndex, torch.Tensor]],
    *,
    sync: bool = True,
    read_back: bool = False,
) -> Written:
    """Write tensors to one file, and say where they lie.

    Args:
        path: the file.
        tensors: they may be made one at a time; none is kept.
        sync: whether to wait for the disk; otherwise it has begun, and the caller syncs the file later.
        read_back: whether to read the synced file again from the disk, and compare.

    Raises:
        OSError, RuntimeError: the disk is full, or the file reads back other than it was written.
        CheckpointError: a tensor is not finite.
    """
    written = Written()
    with path.open("wb") as file, _without_crc32():
        stream = _HashingFile(file)
        for index, tensor in tensors:
            written.add(Written(squares={index.fqn: _square(index, tensor)}))
            start = stream.size
            torch.save(alone_in_storage(tensor), stream)  # type: ignore[arg-type] # it only writes
            stream.begin_sync()
            written.places[index] = _StorageInfo(path.name, start, stream.size - start)
        file.flush()
        if sync:
            os.fsync(file.fileno())
        if read_back:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
    if read_back and checksum_of(path) != stream.hash.hexdigest():
        raise OSError(f"{path} reads back other than it was written")
    written.files[path.name] = {"bytes": stream.size, ALGORITHM: stream.hash.hexdigest()}
    return written


def _square(index: MetadataIndex, tensor: torch.Tensor) -> float:
    """The sum of a tensor's squared values; that it is finite is the quickest proof that they all are.

    Raises:
        CheckpointError: they are not.
    """
    if not tensor.is_floating_point():
        return 0.0
    norm = _norm(tensor, torch.float32)
    if not math.isfinite(norm):
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            at = list(index.offset or ())
            raise CheckpointError(
                f"{index.fqn} (the part at {at}) holds {wrong:,} of {tensor.numel():,} numbers that are not finite"
            )
        norm = _norm(tensor, torch.float64)  # the squares were too large for float32
    return norm * norm


def _norm(tensor: torch.Tensor, dtype: torch.dtype) -> float:
    """Of all elements; what is of another type is converted a chunk at a time."""
    parts = [tensor] if tensor.dtype == dtype else tensor.flatten().split(_CONVERTED)
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=dtype)) for part in parts))


def _without_crc32() -> AbstractContextManager[None]:
    """torch.save of this thread computes no checksum of its own; there is a better one over all of a file."""
    return serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]


class _HashingFile:
    """A file that is written to, with the hash of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash, self.size = file, new_hash(), 0
        self._syncing = 0

    def write(self, content: memoryview) -> int:
        for start in range(0, len(content), CACHED_BYTES):
            piece = content[start : start + CACHED_BYTES]
            self.hash.update(piece)
            self._file.write(piece)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    def begin_sync(self) -> None:
        """Let the disk work while the next tensors are hashed; the sync at the end then has little left to do."""
        self._syncing = begin_sync(self._file, self._syncing)


def alone_in_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor with nothing around it, for torch.save writes all of what a tensor is a view of."""
    tensor = tensor.detach().cpu().contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    own = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())


def write_index(folder: Path, index: Metadata, written: Written) -> None:
    """Write torch's index of a checkpoint.

    Args:
        folder: the checkpoint's.
        index: what the tensors are.
        written: what all processes wrote.
    """
    index.storage_data = written.places
    index.version = CURRENT_DCP_VERSION
    index.storage_meta = StorageMeta()  # where the folder lies is nothing that a checkpoint depends on
    with (folder / INDEX).open("wb") as file:
        pickle.dump(index, file)
