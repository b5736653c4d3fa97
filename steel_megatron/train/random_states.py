"""The states of all random generators of a process: torch, numpy, Python and megatron-core's named ones.

The library itself draws from none of them while a run trains: orders and dropout masks are computed from seeds and
positions. Objectives, callbacks and layers of a user's own may, and resume exactly all the same.
"""

from __future__ import annotations

import hashlib
import random
import struct
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

if TYPE_CHECKING:
    from steel_megatron.parallel.topology import Topology

_WORDS = {"numpy": 624, "python": 625}
"""Words of 32 bits in the states of the two Mersenne twisters."""
_REST = "<qqd"
"""What numpy and Python keep beside: a position, whether a normal number is left over, and that number."""


def states() -> dict[str, torch.Tensor]:
    """The state of each generator of this process, as bytes on the CPU."""
    found = {"torch": torch.get_rng_state()}
    words, position, has_left, left = cast(tuple, np.random.get_state(legacy=True))[1:]
    found["numpy"] = _packed(words, position, has_left, left)
    _, python_words, python_left = random.getstate()
    found["python"] = _packed(python_words, 0, python_left is not None, python_left or 0.0)
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        found[f"megatron.{name}"] = state.clone()
    return found


def put_back(found: dict[str, torch.Tensor]) -> None:
    """Give generators the states that :func:`states` returned; those of which there is none stay as they are."""
    tracker = get_cuda_rng_tracker()
    named = tracker.get_states()
    for name, state in found.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "cuda":
            torch.cuda.set_rng_state(state)
        elif name == "numpy":
            words, (position, has_left, left) = _unpacked(state, _WORDS[name])
            np.random.set_state(("MT19937", words, position, has_left, left))
        elif name == "python":
            words, (_, has_left, left) = _unpacked(state, _WORDS[name])
            random.setstate((3, tuple(words.tolist()), left if has_left else None))
        else:
            named[name.removeprefix("megatron.")] = state.clone()
    if named:
        tracker.set_states(named)


def _packed(words: object, *rest: float) -> torch.Tensor:
    content = np.asarray(words, dtype="<u4").tobytes() + struct.pack(_REST, *rest)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _unpacked(state: torch.Tensor, words: int) -> tuple[np.ndarray, tuple[int, int, float]]:
    content = state.numpy().tobytes()
    return np.frombuffer(content, dtype="<u4", count=words), struct.unpack_from(_REST, content, 4 * words)


def sharded() -> dict[str, ShardedTensor]:
    """The states for a checkpoint, one row of each for each process."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"random.{name}", state.unsqueeze(0), place, replica_id=0)
        for name, state in states().items()
    }


def seed_all(seed: int, step: int, topology: Topology) -> None:
    """Seed every generator, where a run begins or where states cannot be put back as there are other processes.

    Processes that share a tensor-parallel group get the same states, so that what all of them compute stays the same,
    but for megatron-core's named generators, which are for what each has a part of.

    Args:
        seed: of the run.
        step: optimizer steps done.
        topology: the process groups.
    """
    groups = topology.groups
    own = _number(seed, step, groups.pp.rank(), groups.dp_cp.rank())
    torch.manual_seed(own)  # of the device as well
    np.random.seed(own % 2**32)
    random.seed(own)
    named = get_cuda_rng_tracker().get_states()
    parts = (groups.pp.rank(), groups.dp_cp.rank(), groups.tp.rank())
    for name in named:
        generator = torch.Generator(topology.device).manual_seed(_number(seed, step, *parts, *name.encode()))
        named[name] = generator.get_state()
    if named:
        get_cuda_rng_tracker().set_states(named)


def _number(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
