"""Random choices that depend on a key alone, so that they are the same in every process."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..sockets import ConfigError

T = TypeVar("T")
BLOCK = 64


class Draws:
    """A stream of choices drawn from a NumPy generator seeded with `key` (ints >= 0).

    Numbers are taken from the generator in blocks: a scalar draw costs microseconds there.

    Example:
        >>> Draws(0, 7).pick("abc") == Draws(0, 7).pick("abc")
        True
    """

    def __init__(self, *key: int):
        if min(key) < 0:
            raise ConfigError(f"seed, epoch and index must be >= 0, got {key}")
        self._key = key
        self._generator: np.random.Generator | None = None  # most samples draw little or nothing
        self._pool: list[float] = []

    def unit(self) -> float:
        """Return the next number in [0, 1)."""
        if not self._pool:
            if self._generator is None:
                self._generator = np.random.default_rng(self._key)
            self._pool = self._generator.random(BLOCK).tolist()
        return self._pool.pop()

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.unit() < probability

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * self.unit()

    def pick(self, items: Sequence[T]) -> T:
        """Return one item."""
        return items[int(self.unit() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order."""
        return sorted(items, key=lambda _: self.unit())
