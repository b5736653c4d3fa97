"""Which tokens of a sequence each process holds, under context and sequence parallelism.

Context parallelism of size C cuts a sequence of T tokens into 2 C equal chunks and gives process c the chunks c and
2 C - 1 - c, in this order (megatron's layout): causal attention costs every process the same. Sequence parallelism then
cuts what a process holds into as many equal parts as there are tensor-parallel processes. Positions ascend on every
process, and a process holds one or two ranges of consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

TokenRange = tuple[int, int]
"""The first token of a range, and the token after its last."""


@dataclass(frozen=True)
class SequenceSplit:
    """How sequences are shared.

    Attributes:
        length: T, tokens of a whole sequence; divisible by 2 * context_size and by context_size * tensor_size.
        context_size: context-parallel processes.
        tensor_size: tensor-parallel processes that share the tokens; 1 without sequence parallelism.
    """

    length: int
    context_size: int = 1
    tensor_size: int = 1

    @property
    def ranks(self) -> int:
        """Processes that share a sequence."""
        return self.context_size * self.tensor_size

    @cached_property
    def ranges(self) -> tuple[tuple[TokenRange, ...], ...]:
        """The token ranges of every process, ascending; as many for each process (one may be empty).

        Processes are numbered as in megatron-core's group of tensor- and context-parallel processes: rank
        c * tensor_size + t is tensor-parallel process t of context-parallel process c.
        """
        by_rank = [self._cut(held, part) for held in self._context_ranges() for part in range(self.tensor_size)]
        most = max(map(len, by_rank))
        return tuple((*held, *[(held[-1][1],) * 2] * (most - len(held))) for held in by_rank)

    def _context_ranges(self) -> list[list[TokenRange]]:
        if self.context_size == 1:
            return [[(0, self.length)]]
        size = self.length // (2 * self.context_size)
        mirrored = 2 * self.context_size - 1
        return [
            [(first * size, (first + 1) * size) for first in (rank, mirrored - rank)]
            for rank in range(self.context_size)
        ]

    def _cut(self, held: list[TokenRange], part: int) -> list[TokenRange]:
        """Part number ``part`` of the tokens of ``held``, laid end to end."""
        size = self.length // self.ranks
        first, last = part * size, (part + 1) * size
        ranges, offset = [], 0
        for start, stop in held:
            low, high = max(first - offset, 0), min(last - offset, stop - start)
            if low < high:
                ranges.append((start + low, start + high))
            offset += stop - start
        return ranges

    def positions(self, rank: int) -> torch.Tensor:
        """int64 [T / ranks], where the tokens of process ``rank`` stand in the whole sequence; ascending."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.ranges[rank]])
