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
from fairchem_dens.ops.trilinear import Layout, trilinear


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
"""For each irrep of the atom (E, K, 2l + 1), with the rows of all paths that start from it, by target."""


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
    weight_order: Tensor

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

        targets = [ir for _, ir in self.irreps_out]
        by_block = [
            [[p for p in self.paths if p.source == place and p.ir == ir] for ir in targets]
            for place in range(len(irreps_in))
        ]
        self.layout = Layout.of(
            [mul for mul, _ in irreps_in],
            [ir.dim for ir in targets],
            [[len(paths) for paths in blocks] for blocks in by_block],
        )
        self.dims = [ir.dim for _, ir in irreps_in]
        tables = [
            _coefficients(ir, irreps_edge, path).flatten(1)
            for (_, ir), blocks in zip(irreps_in, by_block, strict=True)
            for paths in blocks
            for path in paths
        ]
        # In double precision whatever the model's, so that a model made double loses nothing.
        self.register_buffer("table", torch.cat(tables, dim=1), persistent=False)

        self.ending_in = [[place for place, path in enumerate(self.paths) if path.ir == ir] for ir in targets]
        of_paths = torch.arange(self.weight_numel).split(muls)
        # Where in a row of weights, path after path, those of each output channel stand.
        order = torch.cat([of_paths[place] for places in self.ending_in for place in places])
        self.register_buffer("weight_order", order, persistent=False)

    def couplings(self, harmonics: Tensor) -> Couplings:
        """Return the matrices of edges with harmonics (E, D)."""
        flat = harmonics @ self.table.to(harmonics.dtype)
        shapes = list(zip(self.layout.rows, self.dims, strict=True))
        parts = flat.split([rows * dim for rows, dim in shapes], dim=1)
        # Each a block of its own: cut out of one row, every product would read it in steps.
        return [part.reshape(-1, *shape).contiguous() for part, shape in zip(parts, shapes, strict=True)]

    def forward(
        self, x: Features, couplings: Couplings, weights: Tensor | None, couplings_once: bool = False
    ) -> Features:
        """Couple the features of E edges.

        Args:
            x: of ``irreps_in``.
            couplings: of `couplings`.
            weights: (E, W), sorted by ``weight_order``; None for ones.
            couplings_once: ``matrices_once`` of `trilinear`.

        Returns:
            Features of ``irreps_out``.
        """
        return trilinear(x, couplings, weights, self.layout, couplings_once)


def _coefficients(ir_in: o3.Irrep, irreps_edge: o3.Irreps, path: Path) -> Tensor:
    """Return (D, 2l_out + 1, 2l_in + 1); all components of the edge but the path's are zero."""
    table = torch.zeros(irreps_edge.dim, path.ir.dim, ir_in.dim, dtype=torch.float64)
    symbols = o3.wigner_3j(ir_in.l, irreps_edge[path.edge].ir.l, path.ir.l, dtype=torch.float64)
    table[irreps_edge.slices()[path.edge]] = math.sqrt(path.ir.dim) * symbols.permute(1, 2, 0)
    return table
