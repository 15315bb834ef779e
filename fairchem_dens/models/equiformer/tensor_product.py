"""The depthwise tensor product of atoms with the spherical harmonics of an edge.

Each channel of an atom is coupled with the harmonics by itself; a weight for each channel and path, none
between channels. For a given edge the product is linear in the atom, so that the Clebsch-Gordan coefficients
and the harmonics make one small matrix for each irrep of the atom. It is the same in all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens.models.equiformer.features import SCALAR, Features, in_order


@dataclass(frozen=True)
class Path:
    """Couples one irrep of the atom with one of the edge to one of the output.

    Attributes:
        source, edge: places in the irreps of atom and edge.
        ir: irrep of the output.
    """

    source: int
    edge: int
    ir: o3.Irrep


Couplings = list[Tensor]
"""For each irrep of the atom (E, K, 2l + 1), with the rows of all paths that start from it."""


class DepthwiseTensorProduct(nn.Module):
    """Tensor product of features with harmonics, channel by channel.

    Paths end in irreps that are wanted, and always in scalars. Each output component of unit inputs has unit
    variance (e3nn's 'component'). Weights are in the order of `weight_order`.

    Args:
        irreps_in: of the atoms, each irrep once.
        irreps_edge: of the harmonics.
        irreps_wanted: which irreps to make, whatever their number.
    """

    table: Tensor

    def __init__(self, irreps_in: o3.Irreps, irreps_edge: o3.Irreps, irreps_wanted: o3.Irreps) -> None:
        super().__init__()
        self.paths = tuple(
            Path(source, edge, ir)
            for source, (_, ir_in) in enumerate(irreps_in)
            for edge, (_, ir_edge) in enumerate(irreps_edge)
            for ir in ir_in * ir_edge
            if ir in irreps_wanted or ir == SCALAR
        )
        muls = [irreps_in[path.source].mul for path in self.paths]
        self.irreps_out = in_order(o3.Irreps([(m, p.ir) for m, p in zip(muls, self.paths, strict=True)]))
        self.weight_numel = sum(muls)

        self.rows = [[p.ir.dim for p in self.paths if p.source == place] for place in range(len(irreps_in))]
        self.shapes = [(sum(rows), ir.dim) for rows, (_, ir) in zip(self.rows, irreps_in, strict=True)]
        tables = [_coefficients(irreps_in[path.source].ir, irreps_edge, path) for path in self.paths]
        # In double precision whatever the model's, so that a model made double loses nothing.
        self.register_buffer("table", torch.cat([one.flatten(1) for one in tables], dim=1), persistent=False)

        self.ending_in = [
            [place for place, path in enumerate(self.paths) if path.ir == ir] for _, ir in self.irreps_out
        ]
        of_paths = torch.arange(self.weight_numel).split(muls)
        self.weight_order = torch.cat([of_paths[place] for places in self.ending_in for place in places])
        """Where in a row of weights, path after path, those of each output channel stand."""

    def couplings(self, harmonics: Tensor) -> Couplings:
        """Return the matrices of edges with harmonics (E, D)."""
        flat = harmonics @ self.table.to(harmonics.dtype)
        sizes = [rows * dim for rows, dim in self.shapes]
        return [
            part.view(-1, *shape) for part, shape in zip(flat.split(sizes, dim=1), self.shapes, strict=True)
        ]

    def forward(self, x: Features, couplings: Couplings, weights: Tensor) -> Features:
        """Couple the features of E edges.

        Args:
            x: of ``irreps_in``.
            couplings: of `couplings`.
            weights: (E, W) or (W,), sorted by ``weight_order``.

        Returns:
            Features of ``irreps_out``.
        """
        of_paths = [
            part
            for matrix, one, rows in zip(couplings, x, self.rows, strict=True)
            for part in (matrix @ one).split(rows, dim=1)
        ]
        by_irrep = weights.split([mul for mul, _ in self.irreps_out], dim=-1)
        return [
            torch.cat([of_paths[place] for place in places], dim=-1) * weight.unsqueeze(-2)
            for places, weight in zip(self.ending_in, by_irrep, strict=True)
        ]


def _coefficients(ir_in: o3.Irrep, irreps_edge: o3.Irreps, path: Path) -> Tensor:
    """Return (D, 2l_out + 1, 2l_in + 1); all components of the edge but the path's are zero."""
    table = torch.zeros(irreps_edge.dim, path.ir.dim, ir_in.dim, dtype=torch.float64)
    symbols = o3.wigner_3j(ir_in.l, irreps_edge[path.edge].ir.l, path.ir.l, dtype=torch.float64)
    table[irreps_edge.slices()[path.edge]] = math.sqrt(path.ir.dim) * symbols.permute(1, 2, 0)
    return table
