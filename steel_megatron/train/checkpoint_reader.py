"""Reads tensors of a checkpoint into memory that is there already, in threads."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, load_state_dict
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

THREADS = 2
"""Of a process; each reads whole files."""


def fill(state: ShardedStateDict, folder: Path) -> None:
    """Fill tensors from a checkpoint, under whatever layout it was saved; every process calls it.

    Args:
        state: sharded tensors with data, which is overwritten.
        folder: the checkpoint's.
    """
    planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=list(nested_values(state)))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(state)
    load_state_dict(mcore_to_pyt_state_dict(by_key, is_loading=True), _Reader(folder), planner=planner)


class _Reader(FileSystemReader):
    """Reads several files at once; torch's reads one after the other."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            of_file[self.storage_data[item.storage_index].relative_path].append(item)
        read = super().read_data
        with ThreadPoolExecutor(THREADS) as threads:
            for part in threads.map(
                lambda items: read(dataclasses.replace(plan, items=items), planner), of_file.values()
            ):
                part.wait()
        done: Future[None] = Future()
        done.set_result(None)
        return done
