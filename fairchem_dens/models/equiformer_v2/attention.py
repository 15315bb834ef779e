"""Equivariant graph attention (arXiv 2306.12059, section 4.1).

    message of an edge = convolution 2 ∘ activation ∘ convolution 1 (both ends, in the frame of the edge)
    output of a node   = projection of the attention-weighted sum of its messages, rotated back

The parameters, their names and their order are fairchem's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairchem.core.models.equiformer_v2.so3 import SO3_Embedding
from fairchem.core.models.equiformer_v2.transformer_block import SO2EquivariantGraphAttention
from torch import Tensor

from fairchem_dens.models.equiformer_v2.geometry import Geometry, Grids
from fairchem_dens.models.equiformer_v2.memory import recomputed
from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM, OnPath
from fairchem_dens.models.equiformer_v2.radial import radial_hidden
from fairchem_dens.ops.grid_ffn import degree_linear
from fairchem_dens.ops.layout import Rows, constant
from fairchem_dens.ops.precision import at_least_single
from fairchem_dens.ops.so2 import RadialTail, convolve, real_weight


class Attention(OnPath, SO2EquivariantGraphAttention):
    """Attention from node features to node features.

    Args:
        grids: transforms to and from the sphere.
        recompute: one of `memory.LEVELS`.
        arguments: fairchem's.
    """

    def __init__(self, grids: Grids, recompute: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rows = Rows(self.lmax_list[0], self.mmax_list[0])
        self.grids, self.recompute = grids, recompute

    def forward(self, x: Tensor, geometry: Geometry, dropout: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (N, (L+1)², C).
            geometry: of E edges.
            dropout: (E, heads), factors on the attention weights.

        Returns:
            (N, (L+1)², output channels).
        """
        if self.path == FAIRCHEM:
            return self.stock(x, geometry)
        features, logits = self.features(x, geometry, self.rows.mmax)
        values = convolve(features, _weights(self.so2_conv_2), self.so2_conv_2.fc_m0.bias, self.rows)
        values = values.unflatten(1, (self.rows.num_kept, -1))
        out = self.path.attend(values, logits, geometry.wigner, geometry.edges, self.rows, dropout)
        return degree_linear(out, self.proj.weight, self.proj.bias)

    def stock(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Do what `forward` does in fairchem's code, which draws its dropout itself."""
        embedding = SO3_Embedding(0, self.lmax_list.copy(), x.shape[2], x.device, x.dtype)
        embedding.set_embedding(x)
        inputs = geometry.stock
        return (
            super()
            .forward(embedding, inputs.atomic_numbers, inputs.edge_features, inputs.edge_index)
            .embedding
        )

    def draw_dropout(self, geometry: Geometry) -> Tensor | None:
        """Return factors on attention weights, (E, heads), or None where there are none to draw."""
        if self.alpha_dropout is None or not self.training or self.path == FAIRCHEM:
            return None
        # Head by head in memory, like fairchem's weights: recent versions of torch draw in that order.
        ones = at_least_single(geometry.wigner).new_ones(self.num_heads, len(geometry.edges)).T
        return self.alpha_dropout(ones).contiguous()

    def features(self, x: Tensor, geometry: Geometry, highest_order: int) -> tuple[Tensor, Tensor]:
        """Return what the second convolution is applied to, and the logits of attention.

        Args:
            x: (N, (L+1)², C).
            geometry: of E edges.
            highest_order: features of higher orders are left out.

        Returns:
            (E, rows of order ≤ ``highest_order``, hidden channels) and (E, heads).
        """
        out = self._first_convolution(x, geometry)
        hidden = self.rows.num_kept * self.hidden_channels
        extra, features = out.split([out.shape[1] - hidden, hidden], dim=1)
        alpha, gating = extra.tensor_split([self.num_heads * self.attn_alpha_channels], dim=1)
        features = self._activation(features.unflatten(1, (self.rows.num_kept, -1)), gating, highest_order)
        if self.recompute == "activations":
            return features, recomputed(self._logits, alpha)
        return features, self._logits(alpha)

    def _first_convolution(self, x: Tensor, geometry: Geometry) -> Tensor:
        convolution, rows = self.so2_conv_1, self.rows
        function = self.rad_func if self.use_m_share_rad else convolution.rad_func
        hidden = radial_hidden(self, function, geometry, recompute=self.recompute == "activations")
        weight, bias = function.net[-1].weight, function.net[-1].bias
        if self.use_m_share_rad:  # one row for each degree, used by all of its orders
            degrees = tuple(
                degree for order in range(rows.mmax + 1) for degree in range(order, rows.lmax + 1)
            )
            index = constant(degrees, weight.device, torch.long)
            weight = weight.unflatten(0, (rows.lmax + 1, -1))[index].flatten(0, 1)
            bias = bias.unflatten(0, (rows.lmax + 1, -1))[index].flatten(0, 1)
        weights, bias_0 = _weights(convolution), convolution.fc_m0.bias
        if self.recompute == "none":
            scale = F.linear(hidden, weight, bias).unflatten(1, (rows.num_radial, -1))
            rotated = self.path.rotate(x, geometry.edges, geometry.wigner, scale, rows)
            return convolve(rotated, weights, bias_0, rows)
        tail = RadialTail(hidden, weight, bias)
        return self.path.rotate_and_convolve(x, geometry.edges, geometry.wigner, tail, weights, bias_0, rows)

    def _activation(self, features: Tensor, gating: Tensor, highest_order: int) -> Tensor:
        if self.use_gate_act:
            kept = features[:, : sum(self.rows.sizes[: highest_order + 1])]
            gates = F.pad(gating.sigmoid().unflatten(1, (self.rows.lmax, -1)), (0, 0, 1, 0))
            index = constant(self.rows.degrees[: kept.shape[1]], gates.device, torch.long)
            return torch.cat([F.silu(kept[:, :1]), kept[:, 1:] * gates[:, index[1:]]], dim=1)
        to_grid, from_grid = self.grids.of_edges(highest_order, self.rows)
        return self.path.s2_activation(features, gating if self.use_sep_s2_act else None, to_grid, from_grid)

    def _logits(self, alpha: Tensor) -> Tensor:
        alpha = at_least_single(alpha).unflatten(1, (self.num_heads, -1))
        with torch.autocast(alpha.device.type, enabled=False):
            alpha = self.alpha_norm(alpha)
            slope = self.alpha_act.alpha
            # A leaky ReLU whose kink is smoothed as SiLU smooths that of ReLU.
            alpha = slope * alpha + (1 - slope) * F.silu(alpha)
            return (alpha * self.alpha_dot).sum(dim=2)


def _weights(convolution: Any) -> list[Tensor]:
    """The weights of a convolution's orders, as real matrices."""
    return [convolution.fc_m0.weight, *(real_weight(one.fc.weight) for one in convolution.so2_m_conv)]
