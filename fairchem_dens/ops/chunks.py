"""Working through edges or nodes in portions, so that what lives for a moment only stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 4 * 2**20
"""On a CPU: about what a core has of second-level cache."""
DEVICE_BYTES = 2**29
"""Elsewhere: enough to keep a GPU busy."""


def portions(total: int, bytes_each: int, device: torch.device, least: int = 1) -> Iterator[slice]:
    """Cut ``range(total)`` into slices.

    The cuts depend on sizes and the kind of device alone, so that sums over portions are the same in each
    run.

    Args:
        total: number of items.
        bytes_each: what one item needs for a moment.
        device: where.
        least: items in a portion at least, for matrix products that want many rows.
    """
    budget = CACHE_BYTES if device.type == "cpu" else DEVICE_BYTES
    size = max(least, budget // max(bytes_each, 1), 1)
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values[i] to out[index[i]], in a fixed order on each device."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:  # sorts the indices; index_add_ would use atomic additions, in any order
        out.index_put_((index,), values, accumulate=True)
