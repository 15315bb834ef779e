"""Nonlinearities: on scalars, and gates that let scalars act on everything else.

Each is scaled so that the variance of a normal input is kept, with e3nn's estimate of that scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


def _smooth_leaky_relu(x: Tensor) -> Tensor:
    return LEAKY_SLOPE * x + (1 - LEAKY_SLOPE) * F.silu(x)


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """A leaky ReLU without a kink, scaled: 0.2 x + 0.8 SiLU(x)."""
    scale = _scale(_smooth_leaky_relu)
    return torch.add((scale * LEAKY_SLOPE) * x, F.silu(x), alpha=scale * (1 - LEAKY_SLOPE))


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

    table: Tensor

    def __init__(self, irreps: o3.Irreps) -> None:
        super().__init__()
        self.sizes = [mul for mul, _ in irreps]
        gates = o3.Irreps([(sum(self.sizes[1:]), SCALAR)])
        self.irreps_in = (irreps[:1] + gates + irreps[1:]).simplify()
        # Scalars become c x σ(x), gates c σ(x).
        table = torch.zeros(2, sum(self.sizes), dtype=torch.float64)
        table[0, : self.sizes[0]] = _scale(F.silu)
        table[1, self.sizes[0] :] = _scale(torch.sigmoid)
        # In double precision whatever the model's, so that a model made double loses nothing.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Features) -> Features:
        """Map ``irreps_in`` to the irreps of the output."""
        slope, offset = self.table.to(x[0].dtype)
        activated: Tensor = _Gated.apply(x[0], slope, offset)  # type: ignore[no-untyped-call]
        scalars, *gates = activated.split(self.sizes, dim=-1)
        return [scalars, *(one * gate for one, gate in zip(x[1:], gates, strict=True))]


class _Gated(torch.autograd.Function):
    """(a x + b) σ(x): SiLU and sigmoid of channels side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope, offset)
        return torch.addcmul(offset, slope, x).mul_(torch.sigmoid(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return _GatedSlope.apply(g, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _GatedSlope(torch.autograd.Function):
    """g times the derivative of (a x + b) σ(x), which is σ (a + (1 − σ) (a x + b))."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, slope, offset)
        sigma = torch.sigmoid(x)
        line = torch.addcmul(offset, slope, x)
        return torch.addcmul(line + slope, line, sigma, value=-1).mul_(sigma).mul_(g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, x, slope, offset = ctx.saved_tensors
        sigma = torch.sigmoid(x)
        line = torch.addcmul(offset, slope, x)
        # The second derivative is σ (1 − σ) (2 a + (1 − 2 σ) (a x + b)).
        curve = torch.addcmul(torch.add(line, slope, alpha=2), line, sigma, value=-2)
        by_x = torch.addcmul(sigma, sigma, sigma, value=-1) * curve * (v * g)
        return _GatedSlope.apply(v, x, slope, offset), by_x, None, None  # type: ignore[no-untyped-call]
