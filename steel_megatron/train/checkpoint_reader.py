"""Reads tensors of a checkpoint into memory that is there already, in threads."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, load
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

THREADS = 2
"""Of a process; each reads whole files."""
BYTES = "data/0"
"""The record of a tensor's bytes in what torch.save writes."""


def fill(state: ShardedStateDict, folder: Path) -> None:
    """Fill tensors from a checkpoint, under whatever layout it was saved; every process calls it.

    Args:
        state: sharded tensors with data, which is overwritten.
        folder: the checkpoint's.
    """
    planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=list(nested_values(state)))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state)
    load(mcore_to_pyt_state_dict(by_key, is_loading=True), storage_reader=_Reader(folder), planner=planner)


class _Reader(FileSystemReader):
    """Reads several files at once, and what is wanted as it was saved straight to where it belongs.

    torch's reader takes one file after the other, and copies each tensor from memory of its own.
    """

    def set_up_storage_reader(self, metadata: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            of_file[self.storage_data[item.storage_index].relative_path].append(item)
        read_others = super().read_data

        def read(name: str, items: Sequence[ReadItem]) -> None:
            with (Path(self.path) / name).open("rb") as file:
                others = [item for item in items if not self._read_in_place(file, item, planner)]
            read_others(replace(plan, items=others), planner)

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(read, of_file, of_file.values()))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_in_place(self, file: IO[bytes], item: ReadItem, planner: LoadPlanner) -> bool:
        """Read a tensor if its bytes in the file are those of the memory that it is wanted in."""
        stored, target = self._tensors[item.storage_index.fqn], planner.resolve_tensor(item).detach()
        if stored.properties.dtype != target.dtype or target.device.type != "cpu" or not target.is_contiguous():
            return False
        place = self.storage_data[item.storage_index]
        archive = torch._C.PyTorchFileReader(self._slice_file(file, place))
        layout = (0, tuple(target.shape), target.stride())
        if stored_layout(archive) != layout or archive.get_record_size(BYTES) != target.nbytes:
            return False
        file.seek(place.offset + archive.get_record_offset(BYTES))  # type: ignore[attr-defined]
        if file.readinto(target.flatten().view(torch.uint8).numpy()) != target.nbytes:  # type: ignore[attr-defined]
            raise EOFError(f"{place.relative_path} ends within a tensor")
        planner.commit_tensor(item, target)
        return True


def stored_layout(archive: Any) -> Any:
    """Offset, sizes and strides of the tensor in an archive that torch.save wrote (torch's PyTorchFileReader)."""
    return _Layout(io.BytesIO(archive.get_record("data.pkl"))).load()


class _Layout(pickle.Unpickler):
    """Offset, sizes and strides of a tensor that torch.save wrote; nothing that its pickle names is called."""

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        return lambda *args: args[1:4]
