"""Processes are used again, and one that fails, dies or hangs is named and replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from steel_megatron.config import ParallelConfig
from tests.layouts.pool import Pool


@pytest.fixture
def own() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def summed(tensor_parallel: int) -> tuple[int, int, float]:
    """This process, its rank, and the sum of all ranks plus one in its tensor-parallel group."""
    import torch
    import torch.distributed as dist

    from steel_megatron.parallel.topology import initialize

    topology = initialize(ParallelConfig(tensor_model_parallel_size=tensor_parallel))
    number = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(number, group=topology.groups.tp)
    return os.getpid(), dist.get_rank(), float(number)


def trouble(what: str) -> None:
    """Rank 1 gets into it, the others wait for it."""
    import torch.distributed as dist

    from steel_megatron.parallel.topology import initialize

    if initialize(ParallelConfig()).launch.rank == 1:
        if what == "dies":
            os._exit(3)
        if what == "hangs":
            time.sleep(600)
        raise ValueError("a bug")
    dist.barrier()


def test_processes_are_used_again_with_groups_of_their_own(own: Pool) -> None:
    first = own.run(summed, 3, 3)
    second = own.run(summed, 2, 1)
    third = own.run(summed, 4, 2)
    assert [answer[1:] for answer in first] == [(0, 6.0), (1, 6.0), (2, 6.0)]
    assert [answer[1:] for answer in second] == [(0, 1.0), (1, 2.0)]
    assert [answer[1:] for answer in third] == [(0, 3.0), (1, 3.0), (2, 7.0), (3, 7.0)]
    assert len({answer[0] for answer in first + second + third}) == 4


def test_two_tasks_at_the_same_time(own: Pool) -> None:
    one, other = own.start(summed, 2, 2), own.start(summed, 1, 1)
    assert [answer[2] for answer in other.results() + one.results()] == [1.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("what", "timeout", "said"),
    [
        ("fails", 60.0, r"rank 1 of 2 failed: ValueError: a bug"),
        ("dies", 60.0, r"rank 1 of 2 died with exit code 3"),
        pytest.param(
            "hangs",
            8.0,
            r"rank 0 of 2 did not answer in time\nrank 1 of 2 did not answer in time",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_goes_wrong_is_said_and_processes_are_replaced(own: Pool, what: str, timeout: float, said: str) -> None:
    before = {answer[0] for answer in own.run(summed, 2, 2)}
    with pytest.raises(AssertionError, match=said):
        own.run(trouble, 2, what, timeout=timeout)
    after = own.run(summed, 2, 2)
    assert [answer[1:] for answer in after] == [(0, 3.0), (1, 3.0)]
    assert not before & {answer[0] for answer in after}
