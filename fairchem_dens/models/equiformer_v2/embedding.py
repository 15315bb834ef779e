"""What a node starts with from its edges, with fairchem's parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fairchem.core.models.equiformer_v2.input_block import EdgeDegreeEmbedding
from torch import Tensor

from fairchem_dens.models.equiformer_v2.geometry import Geometry
from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM, OnPath
from fairchem_dens.models.equiformer_v2.radial import radial_hidden
from fairchem_dens.ops.layout import Rows


class EdgeDegree(OnPath, EdgeDegreeEmbedding):
    """The sum of a node's edges as spherical harmonics, weighted by a radial function.

    Args:
        recompute: one of `memory.LEVELS`.
        arguments: fairchem's.
    """

    def __init__(self, recompute: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rows, self.recompute = Rows(self.lmax_list[0], self.mmax_list[0]), recompute

    def forward(self, geometry: Geometry) -> Tensor:
        """Return (N, (L+1)², C)."""
        if self.path == FAIRCHEM:
            inputs = geometry.stock
            return (
                super()
                .forward(
                    inputs.atomic_numbers,
                    inputs.edge_features,
                    inputs.edge_index,
                    geometry.edges.num_nodes,
                )
                .embedding
            )
        hidden = radial_hidden(self, self.rad_func, geometry, recompute=self.recompute == "activations")
        last = self.rad_func.net[-1]
        radial = F.linear(hidden, last.weight, last.bias).unflatten(1, (self.rows.lmax + 1, -1))
        out = self.path.edge_degree(radial, geometry.wigner, geometry.edges, self.rows)
        return out / self.rescale_factor
