"""A bounded choice of many points, for pictures."""

from __future__ import annotations

import numpy as np

LIMIT = 100_000


class Pairs:
    """Pairs of a true and a predicted value: all of them, or evenly spread ones if they become too many.

    Args:
        limit: keep at most twice as many.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._step = 1
        self._seen = 0
        self._kept = np.empty((0, 2))

    def add(self, true: np.ndarray, predicted: np.ndarray) -> None:
        """Add the values of two arrays of one shape."""
        pairs = np.stack([np.ravel(true), np.ravel(predicted)], axis=1)
        first = -self._seen % self._step
        self._seen += len(pairs)
        self._kept = np.concatenate([self._kept, pairs[first :: self._step]])
        while len(self._kept) > 2 * self._limit:
            self._kept = self._kept[::2]
            self._step *= 2

    def values(self) -> np.ndarray:
        """Return (n, 2): true, predicted."""
        return self._kept
