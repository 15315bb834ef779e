"""How features are held: a list with one tensor for each irrep, (N, 2l + 1, C), channels last.

e3nn keeps all irreps in one row, channel by channel. With the channels last and the irreps apart, a linear
layer is one matrix product for each degree, and nothing is cut out of rows or put back.
"""

from __future__ import annotations

from typing import Any

from e3nn import o3
from torch import Tensor

Features = list[Tensor]
"""One tensor (N, 2l + 1, C) for each entry of some `o3.Irreps`, in its order."""

SCALAR = o3.Irrep("0e")


def in_order(irreps: o3.Irreps) -> o3.Irreps:
    """Return irreps by degree, even ones first, with equal ones merged."""
    return o3.Irreps(sorted(irreps, key=lambda block: (block.ir.l, -block.ir.p))).simplify()


def parse_irreps(name: str, value: Any) -> o3.Irreps:
    """Read one of the model's arguments.

    Args:
        name: of the argument, for the message.
        value: for example ``128x0e+64x1e+32x2e``.

    Raises:
        ValueError: it cannot be read, an irrep occurs twice, or they are not by degree with scalars (0e)
            first.
    """
    try:
        irreps = o3.Irreps(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"'model.{name}' must be irreps such as 128x0e+64x1e+32x2e, found {value!r}."
        ) from error
    if not irreps or irreps != in_order(irreps) or irreps[0].ir != SCALAR or not irreps[0].mul:
        raise ValueError(
            f"'model.{name}' must start with scalars (0e) and go up by degree, each irrep once "
            f"(128x0e+64x1e+32x2e), found {value!r}."
        )
    return irreps


def parse_harmonics(name: str, value: Any) -> o3.Irreps:
    """Read an argument that stands for spherical harmonics: each degree from 0 once.

    Raises:
        ValueError: it is something else.
    """
    irreps = parse_irreps(name, value)
    even = all(ir.p == 1 for _, ir in irreps)
    odd = all(ir.p == (-1) ** ir.l for _, ir in irreps)
    degrees = [(1, degree) for degree in range(len(irreps))]
    if [(mul, ir.l) for mul, ir in irreps] != degrees or len(degrees) < 2 or not (even or odd):
        raise ValueError(
            f"'model.{name}' must be spherical harmonics, each degree from 0 to at least 1 once, with all "
            f"parities even or all those of vectors (1x0e+1x1e+1x2e or 1x0e+1x1o+1x2e), found {value!r}."
        )
    return irreps
