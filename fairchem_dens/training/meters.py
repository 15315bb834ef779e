"""Seconds of training and memory, for the lines that are printed."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GIB = 2**30


class Stopwatch:
    """Seconds between laps, without what is not training: evaluations and the writing of checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._depth = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of this block; blocks may be inside each other."""
        self._depth += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += time.perf_counter() - start

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin the next."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-9)


def memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has needed, on its GPU since the last call."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    used = {"memory_host_peak_GiB": peak * (1 if sys.platform == "darwin" else 1024) / _GIB}
    if device.type == "cuda":
        used["memory_device_peak_GiB"] = torch.cuda.max_memory_allocated(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return used
