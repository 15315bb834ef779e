"""The equivariant linear layer: a matrix for each irrep, a bias on scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens.models.equiformer.features import SCALAR, Features


class Linear(nn.Module):
    """Maps the channels of each irrep; an irrep without input becomes zero.

    Weights start normal with variance 1 / (number of input channels), biases as zeros. All weights are one
    row, ``tp.weight``, the matrices (C_in, C_out) one after the other: what a tensor product with a scalar
    holds in the paper's code.

    Args:
        irreps_in, irreps_out: each irrep once.
        bias: add a bias to scalars (0e), if there are any.
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps, bias: bool = True) -> None:
        super().__init__()
        self.irreps_out = irreps_out
        places = {ir: place for place, (_, ir) in enumerate(irreps_out)}
        self.paths = [
            (source, places[ir], mul, irreps_out[places[ir]].mul)
            for source, (mul, ir) in enumerate(irreps_in)
            if ir in places
        ]
        self.sizes = [mul_in * mul_out for _, _, mul_in, mul_out in self.paths]
        matrices = [torch.randn(mul_in * mul_out) / math.sqrt(mul_in) for _, _, mul_in, mul_out in self.paths]
        self.tp = nn.ParameterDict({"weight": nn.Parameter(torch.cat([torch.zeros(0), *matrices]))})
        self.bias = nn.ParameterList(
            [torch.zeros(mul) for mul, ir in irreps_out if ir == SCALAR] if bias else []
        )

    def matrices(self) -> dict[int, Tensor]:
        """Return the matrix (C_in, C_out) of each output irrep that has an input, by its place."""
        weights = self.tp["weight"].split(self.sizes)
        return {
            place: weight.view(mul_in, mul_out)
            for (_, place, mul_in, mul_out), weight in zip(self.paths, weights, strict=True)
        }

    def forward(self, x: Features, scales: Sequence[Tensor] | None = None) -> Features:
        """Map ``irreps_in`` to ``irreps_out``.

        Args:
            x: of ``irreps_in``.
            scales: for each input irrep (C,), numbers to multiply its channels by; None for ones.
        """
        matrices = self.matrices()
        if scales is not None:
            matrices = {
                place: scales[source][:, None] * matrices[place] for source, place, _, _ in self.paths
            }
        sources = {place: source for source, place, _, _ in self.paths}
        out = []
        for place, (mul, ir) in enumerate(self.irreps_out):
            if place not in matrices:
                out.append(x[0].new_zeros(len(x[0]), ir.dim, mul))
                continue
            bias = self.bias[0] if ir == SCALAR and len(self.bias) else None
            out.append(F.linear(x[sources[place]], matrices[place].mT, bias))
        return out
