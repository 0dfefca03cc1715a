"""Random choices that are the same on every machine and with every numpy.

numpy promises the raw output of its bit generators (PCG64) and of SeedSequence for good, but not the streams of
Generator's methods. So only raw words are taken from numpy, and turned into choices here with integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
BLOCK = 128  # raw words drawn at once


class Dice:
    """A stream of choices that depends on `key` alone: non-negative integers."""

    def __init__(self, *key: int) -> None:
        self.key = key
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._words: list[int] = []

    def aside(self) -> Dice:
        """Other dice, always the same; to throw them leaves these as they are."""
        return Dice(*self.key, 1)

    def below(self, bound: int) -> int:
        """0 .. bound - 1, uniform up to bound / 2^32."""
        if not self._words:
            self._words = (self._bits.random_raw(BLOCK) >> np.uint64(32)).tolist()
        return (self._words.pop() * bound) >> 32

    def between(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return low + self.below(high - low + 1)

    def percent(self, share: int) -> bool:
        """True in `share` of a hundred cases."""
        return self.below(100) < share

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        return self.sample(items, len(items))

    def octets(self, *shape: int) -> np.ndarray:
        """Uniform uint8 of this shape."""
        count = int(np.prod(shape))
        words = self._bits.random_raw(-(-count // 8)).astype("<u8", copy=False)  # the same octets on any byte order
        return words.view(np.uint8)[:count].reshape(shape)
