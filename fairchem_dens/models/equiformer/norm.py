"""Equivariant layer norm."""

from __future__ import annotations

import torch
from e3nn import o3
from torch import nn

from fairchem_dens.models.equiformer.features import SCALAR, Features


class EquivariantLayerNorm(nn.Module):
    """Divides each irrep by the root mean square of its components over all channels.

    Scalars are centred first and get a bias; each channel has a weight.

    Args:
        irreps: of input and output.
        eps: added to the mean square.
    """

    def __init__(self, irreps: o3.Irreps, eps: float = 1e-5) -> None:
        super().__init__()
        self.irreps, self.eps = irreps, eps
        self.affine_weight = nn.Parameter(torch.ones(irreps.num_irreps))
        self.affine_bias = nn.Parameter(torch.zeros(irreps.count(SCALAR)))

    def forward(self, x: Features) -> Features:
        """Keep the shape."""
        weights = self.affine_weight.split([mul for mul, _ in self.irreps])
        out = []
        for (_, ir), one, weight in zip(self.irreps, x, weights, strict=True):
            centred = one - one.mean(dim=-1, keepdim=True) if ir == SCALAR else one
            scale = (centred.square().mean(dim=(-2, -1), keepdim=True) + self.eps).rsqrt()
            normed = centred * (scale * weight)
            out.append(normed + self.affine_bias if ir == SCALAR else normed)
        return out
