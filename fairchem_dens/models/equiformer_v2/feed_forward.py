"""The feed-forward network of a node (arXiv 2306.12059, section 4.3), with fairchem's parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairchem.core.models.equiformer_v2.so3 import SO3_Embedding
from fairchem.core.models.equiformer_v2.transformer_block import FeedForwardNetwork
from torch import Tensor

from fairchem_dens.models.equiformer_v2.geometry import Grids
from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM, OnPath
from fairchem_dens.ops.grid_ffn import degree_linear
from fairchem_dens.ops.layout import constant


class FeedForward(OnPath, FeedForwardNetwork):
    """From node features to node features: a network on a grid, an S2 activation or gates.

    Args:
        grids: transforms to and from the sphere.
        arguments: fairchem's.
    """

    def __init__(self, grids: Grids, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.grids = grids

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, (L+1)², C) to (N, (L+1)², output channels)."""
        if self.path == FAIRCHEM:
            return self.stock(x)
        if self.use_grid_mlp:
            return self._on_grid(x)
        hidden = degree_linear(x, self.so3_linear_1.weight, self.so3_linear_1.bias)
        if self.use_gate_act:
            gates = self.gating_linear(x[:, 0]).sigmoid().unflatten(1, (self.max_lmax, -1))
            degrees = [degree for degree in range(self.max_lmax) for _ in range(2 * degree + 3)]
            index = constant(tuple(degrees), x.device, torch.long)
            hidden = torch.cat([F.silu(hidden[:, :1]), hidden[:, 1:] * gates[:, index]], dim=1)
        else:
            gate = self.gating_linear(x[:, 0]) if self.use_sep_s2_act else None
            tables = self.grids.node_to_grid, self.grids.node_from_grid
            hidden = self.path.s2_activation(hidden, gate, *tables)
        return degree_linear(hidden, self.so3_linear_2.weight, self.so3_linear_2.bias)

    def stock(self, x: Tensor) -> Tensor:
        """Do what `forward` does in fairchem's code."""
        embedding = SO3_Embedding(0, self.lmax_list.copy(), x.shape[2], x.device, x.dtype)
        embedding.set_embedding(x)
        return super().forward(embedding).embedding

    def _on_grid(self, x: Tensor) -> Tensor:
        first, second = self.so3_linear_1, self.so3_linear_2
        inner, middle, outer = (self.grid_mlp[i].weight for i in (0, 2, 4))
        # The first and last layer on the grid, folded into the layers of each degree; in full precision.
        with torch.autocast(x.device.type, enabled=False):
            weight_1, bias_1 = inner @ first.weight, inner @ first.bias
            weight_2 = second.weight[int(self.use_sep_s2_act) :] @ outer
        hidden = degree_linear(x, weight_1, bias_1)
        to_grid, from_grid = self.grids.node_to_grid, self.grids.node_from_grid
        if not self.use_sep_s2_act:
            hidden = self.path.grid_mlp(hidden, middle, to_grid, from_grid)
            return degree_linear(hidden, weight_2, second.bias)
        scalars = F.linear(self.scalar_mlp(x[:, :1]), second.weight[0], second.bias)
        hidden = self.path.grid_mlp(hidden, middle, to_grid, from_grid[:, 1:])
        return torch.cat([scalars, degree_linear(hidden, weight_2, first=1)], dim=1)
