"""One process in the place of a rank of a larger launch: all is built as on that rank, nothing is allocated or sent.

torch has both halves: tensors without memory (FakeTensorMode) and process groups that send nothing ("fake"). What
megatron-core asks of the other processes while it builds a model and an optimizer is answered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def simulated_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be a rank of a launch for a block; tensors that are made in it have shapes and types, but no content.

    Args:
        rank: of the process to stand for.
        world_size: processes of the launch.
    """
    assert not dist.is_initialized(), "there is one launch in a process at a time"
    plain_group = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return plain_group(*args, **{**kwargs, "backend": "fake"})  # megatron-core wants some of gloo as well

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        """megatron-core compares the groups of parameters of all ranks; those of this one stand for all."""
        object_list[:] = [obj] * len(object_list)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    plain_gather, dist.all_gather_object = dist.all_gather_object, all_gather_object
    dist.new_group = new_group
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        dist.new_group, dist.all_gather_object = plain_group, plain_gather
        if dist.is_initialized():
            dist.destroy_process_group()
