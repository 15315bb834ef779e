"""Nonlinearities: on scalars, and gates that let scalars act on everything else.

Each is scaled so that the variance of a normal input is kept, with e3nn's estimate of that scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from e3nn import o3
from e3nn.math import normalize2mom
from torch import Tensor, nn

from fairchem_dens.models.equiformer.features import SCALAR, Features

LEAKY_SLOPE = 0.2


@functools.cache
def _scale(function: Callable[[Tensor], Tensor]) -> float:
    return normalize2mom(function).cst


def silu(x: Tensor) -> Tensor:
    """SiLU, scaled."""
    return F.silu(x) * _scale(F.silu)


def sigmoid(x: Tensor) -> Tensor:
    """Sigmoid, scaled."""
    return torch.sigmoid(x) * _scale(torch.sigmoid)


def _smooth_leaky_relu(x: Tensor) -> Tensor:
    return LEAKY_SLOPE * x + (1 - LEAKY_SLOPE) * F.silu(x)


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """A leaky ReLU without a kink, scaled: 0.2 x + 0.8 SiLU(x)."""
    return _smooth_leaky_relu(x) * _scale(_smooth_leaky_relu)


class ScalarActivation(nn.Module):
    """SiLU on features that are scalars only."""

    def forward(self, x: Features) -> Features:
        """Keep the shape."""
        return [silu(scalars) for scalars in x]


class Gate(nn.Module):
    """SiLU on scalars; all else is multiplied by the sigmoid of a scalar of its own.

    Args:
        irreps: of the output. The input, ``irreps_in``, has one scalar more for each that is no scalar.
    """

    def __init__(self, irreps: o3.Irreps) -> None:
        super().__init__()
        self.sizes = [mul for mul, _ in irreps]
        gates = o3.Irreps([(sum(self.sizes[1:]), SCALAR)])
        self.irreps_in = (irreps[:1] + gates + irreps[1:]).simplify()

    def forward(self, x: Features) -> Features:
        """Map ``irreps_in`` to the irreps of the output."""
        scalars, *gates = x[0].split(self.sizes, dim=-1)
        return [silu(scalars), *(one * sigmoid(gate) for one, gate in zip(x[1:], gates, strict=True))]
