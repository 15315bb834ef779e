"""What all kernels share: how they are launched, and how precisely they multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of a tensor.

    Args:
        kernel: a Triton function.
        grid: number of programs along each axis; with none along one of them, nothing is run.
        on: Triton launches on the current device, which need not be that of the tensors.
        arguments: tensors and numbers.
        constants: arguments that are known when the kernel is compiled, and ``num_warps``.
    """
    if 0 in grid:
        return
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def dot_precision() -> str:
    """Return how Triton shall multiply matrices of float32: as torch does.

    torch has two switches for it since 2.9, and does not tell of the old one where the new one was used.
    """
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    return "tf32" if tf32 else "ieee"


def power_of_two(number: int, smallest: int = 1) -> int:
    """Return the smallest power of two that is at least ``number`` and at least ``smallest``."""
    return max(smallest, 1 << max(number - 1, 0).bit_length())


def blocks(number: int, size: int) -> int:
    """Return how many blocks of a size cover a number of things."""
    return -(-number // size)


class Prepared:
    """Constant tables in the form that a kernel wants, made once for each table, dtype and form.

    Args:
        make: turns a table into that form.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._made: Any = WeakTensorKeyDictionary()

    def __call__(self, table: Tensor, *how: Any) -> Tensor:
        """Return the table made as ``how`` says, for the table's present values."""
        known = self._made.setdefault(table, {})
        key = (0 if table.is_inference() else table._version, table.device, *how)
        if key not in known:
            known[key] = self._make(table, *how)
        return known[key]
