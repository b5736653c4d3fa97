"""Random orders that take no memory: a keyed bijection of ``range(count)``, computed on demand.

A Feistel network scrambles numbers of as few bits as ``count`` needs; a result that is not below ``count`` is scrambled
again until it is (cycle-walking), which keeps it a bijection. It is integer arithmetic modulo 2**64, so the order is
the same on every machine and with every version of numpy, and a resumed run continues in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steel_megatron.data.native import helpers

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # the increment of SplitMix64
_MULTIPLY, _MULTIPLY_AGAIN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the multipliers of its finaliser
# Found by chi-square over all orders of few numbers, and positions, neighbours and fixed points of many.
_ROUNDS, _FEW, _ROUNDS_OF_FEW = 6, 1024, 16


def finalise(value: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit numbers in which each bit depends on all."""
    value = (value ^ value >> 30) * _MULTIPLY & MASK
    value = (value ^ value >> 27) * _MULTIPLY_AGAIN & MASK
    return value ^ value >> 31


def finalise_many(values: np.ndarray) -> np.ndarray:
    """:func:`finalise` of each: uint64 [n] -> uint64 [n]."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(_MULTIPLY)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_MULTIPLY_AGAIN)
    return values ^ values >> np.uint64(31)


def hash64(key: tuple[int, ...]) -> int:
    """A 64-bit number from a tuple of them; another tuple, or another length, gives an unrelated one."""
    state = len(key)
    for word in key:
        assert 0 <= word <= MASK, key
        state = finalise((state ^ word) + GOLDEN & MASK)
    return state


class Permutation:
    """A pseudo-random order of ``range(count)`` that depends on ``count`` and the key alone.

    Args:
        count: how many numbers, from 0 to 2**62.
        key: 64-bit numbers.
    """

    def __init__(self, count: int, key: tuple[int, ...]) -> None:
        assert 0 <= count <= 2**62, count
        self.count = count
        seed = hash64(key)
        rounds = _ROUNDS_OF_FEW if count <= _FEW else _ROUNDS
        self.round_keys = [finalise(seed + round * GOLDEN & MASK) for round in range(1, rounds + 1)]
        bits = max(2, (count - 1).bit_length())
        # Halves of 1 bit at least: a network without one of its halves does not scramble.
        self._halves = (bits // 2, bits - bits // 2)
        self.native: Any = helpers.Permutation(count, self.round_keys) if helpers is not None else None
        """The compiled counterpart, or None."""

    def __len__(self) -> int:
        return self.count

    def __call__(self, position: int) -> int:
        """The number at ``position`` of the order."""
        assert 0 <= position < self.count, (position, self.count)
        if self.native is not None:
            return int(self.native(position))
        left_bits, right_bits = self._halves
        value = position
        while True:
            left, right = value >> right_bits, value & (1 << right_bits) - 1
            for even, odd in zip(self.round_keys[::2], self.round_keys[1::2], strict=True):
                left ^= _scramble(right ^ even) >> 64 - left_bits
                right ^= _scramble(left ^ odd) >> 64 - right_bits
            value = left << right_bits | right
            if value < self.count:
                return value

    def many(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at several positions of the order: int64 [n] -> int64 [n]."""
        if self.native is not None:
            return np.asarray(self.native.many(np.ascontiguousarray(positions, dtype=np.int64)))
        return self.many_by_numpy(positions)

    def many_by_numpy(self, positions: np.ndarray) -> np.ndarray:
        """The reference of :meth:`many`."""
        assert len(positions) == 0 or 0 <= positions.min() <= positions.max() < self.count, (positions, self.count)
        values = self._once(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while len(outside):
            values[outside] = self._once(values[outside])
            outside = outside[values[outside] >= self.count]
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        right_bits = np.uint64(self._halves[1])
        to_left, to_right = (np.uint64(64 - bits) for bits in self._halves)
        left, right = values >> right_bits, values & (np.uint64(1) << right_bits) - np.uint64(1)
        for even, odd in zip(self.round_keys[::2], self.round_keys[1::2], strict=True):
            left = left ^ _scramble_many(right ^ np.uint64(even)) >> to_left
            right = right ^ _scramble_many(left ^ np.uint64(odd)) >> to_right
        return left << right_bits | right


def _scramble(value: int) -> int:
    """The round function, of which the upper bits are used: cheaper than :func:`finalise`, as rounds follow."""
    value = value * _MULTIPLY & MASK
    return (value ^ value >> 32) * _MULTIPLY_AGAIN & MASK


def _scramble_many(values: np.ndarray) -> np.ndarray:
    values = values * np.uint64(_MULTIPLY)
    return (values ^ values >> np.uint64(32)) * np.uint64(_MULTIPLY_AGAIN)
