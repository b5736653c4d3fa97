"""Checksums of a checkpoint's files, each under the name of its algorithm in the manifest.

They find damage, so speed counts: nothing in a checkpoint is executed, and whoever can change a file can change its
checksum as well. XXH3 costs a tenth of SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import xxhash

from steel_megatron.errors import CheckpointError
from steel_megatron.parallel.agreement import first_process_bytes, on_rank0

Result = TypeVar("Result")

ALGORITHM = "xxh3_128"
"""Of new checkpoints."""
_HASHES: dict[str, Callable[[], Any]] = {ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}  # of formats 2 and 1
_THREADS = min(8, os.cpu_count() or 1)
_CACHED_BYTES = 1 << 19
"""Read and then hashed while still in the processor's cache."""


def new_hash() -> Any:
    """A hash of :data:`ALGORITHM`."""
    return _HASHES[ALGORITHM]()


def checksum_of(path: Path, algorithm: str = ALGORITHM) -> str:
    """The checksum of a file's content, in hex."""
    digest, buffer = _HASHES[algorithm](), memoryview(bytearray(_CACHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


def compare_checksums(folder: Path, files: Mapping[str, Mapping[str, Any]], rank: int = 0, world_size: int = 1) -> None:
    """Compare files with their checksums; of several processes, each takes files that it may load itself.

    Args:
        folder: the checkpoint's.
        files: what its manifest says of them, by name.
        rank: of this process.
        world_size: how many processes share the files.

    Raises:
        CheckpointError: a file differs, or cannot be read.
    """

    def differs(name: str) -> str | None:
        algorithm = next((one for one in _HASHES if one in files[name]), None)
        if algorithm is None:
            return f"{folder / name} has a checksum that this version does not know: {', '.join(files[name])}"
        try:
            found = checksum_of(folder / name, algorithm)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != files[name][algorithm]:
            return f"{folder / name} is damaged: its checksum is not the one it was saved with"
        return None

    own = [name for name in files if _who_saved(name) % world_size == rank]
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing and reading release Python's lock
        for message in threads.map(differs, own):
            if message is not None:
                raise CheckpointError(message)


def _who_saved(name: str) -> int:
    tensors = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return int(tensors[1]) if tensors else 0


def verified_by_all(
    find: Callable[[Callable[[Path], None]], Result], verify: Callable[[Path, int, int], None]
) -> Result | None:
    """Let the first process look for a checkpoint, and all processes verify those that it considers.

    Args:
        find: called on the first process with a function that verifies a checkpoint, each file by one process.
        verify: verifies a process's share of a checkpoint, given its rank and the number of processes.

    Returns:
        what ``find`` returned, on the first process; None on the others.

    Raises:
        SteelError: what ``find`` raised, on the first process; one that names it on the others.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def verdict(path: Path) -> str | None:
        """Of all processes, on the first one."""
        own, verdicts = None, [None] * world_size
        try:
            verify(path, rank, world_size)
        except CheckpointError as error:
            own = str(error)
        dist.gather_object(own, verdicts if rank == 0 else None)
        return next((one for one in verdicts if one is not None), None)

    def ask(path: Path) -> None:
        first_process_bytes(os.fsencode(path))
        message = verdict(path)
        if message is not None:
            raise CheckpointError(message)

    def lead() -> Result:
        try:
            return find(ask)
        finally:
            first_process_bytes(b"")

    if rank != 0:
        while path := first_process_bytes(b""):
            verdict(Path(os.fsdecode(path)))
    return on_rank0(lead)
