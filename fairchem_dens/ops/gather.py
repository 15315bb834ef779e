"""From atoms to pairs of atoms, with a gradient that needs neither atomics nor sorting.

Where each pair (i, j) has its reverse (j, i) in the same table, a sum over all pairs that lead to an atom is
one over the reversed pairs, which stand in its row. So the transposed of reading is reading as well: the sum
has one order, on every device, and derivatives of any order are these two operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor, reverse: Tensor) -> Tensor:
    """Read the other atom of each pair.

    Args:
        x: (N, ...), of atoms.
        index: (N, K) int64, the other atom of each pair.
        reverse: (N · K,) int64, where the reversed pair stands; a pair of an atom with itself is its own.

    Returns:
        (N · K, ...).
    """
    return _Gather.apply(x, index, reverse)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """(N, ...) to (N · K, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, reverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, reverse)
        return x.index_select(0, index.reshape(-1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _SumReversed.apply(gradient, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _SumReversed(torch.autograd.Function):
    """(N · K, ...) to (N, ...)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, reverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, reverse)
        return values.index_select(0, reverse).view(*index.shape, *values.shape[1:]).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(gradient, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
