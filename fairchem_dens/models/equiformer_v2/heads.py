"""What is read off the last node features: energies of atoms, and a vector for each.

Both are single channels of single degrees, so most of the layers they are made of has no effect: only what
has one is computed. Its gradients are those of the whole layers, in which the rest has gradients of zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_dens.models.equiformer_v2.attention import Attention
from fairchem_dens.models.equiformer_v2.feed_forward import FeedForward
from fairchem_dens.models.equiformer_v2.geometry import Geometry
from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM
from fairchem_dens.ops.attend import edge_weights, sum_over_edges
from fairchem_dens.ops.so2 import real_weight
from fairchem_dens.ops.zero_gradients import with_zero_gradients


class EnergyHead(FeedForward):
    """A feed-forward network whose output is the scalar of one channel.

    In its separable forms that scalar does not depend on higher degrees.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, (L+1)², C) to (N,)."""
        if self.path == FAIRCHEM:
            return self.stock(x)[:, 0, 0]
        scalars, last = x[:, 0], self.so3_linear_2
        if self.use_grid_mlp and self.use_sep_s2_act:
            hidden = self.scalar_mlp(scalars)
            unused = [*self.so3_linear_1.parameters(), *self.grid_mlp.parameters()]
        elif not self.use_grid_mlp and self.use_gate_act:
            first = self.so3_linear_1
            hidden = F.silu(F.linear(scalars, first.weight[0], first.bias))
            unused = list(self.gating_linear.parameters())
        elif not self.use_grid_mlp and self.use_sep_s2_act:
            hidden = F.silu(self.gating_linear(scalars))
            unused = list(self.so3_linear_1.parameters())
        else:
            return super().forward(x)[:, 0, 0]
        energies = F.linear(hidden, last.weight[0], last.bias)[:, 0]
        return with_zero_gradients(energies, unused)


class VectorHead(Attention):
    """Attention whose output is the vector, l = 1, of one channel.

    The projection, the heads and the second convolution are linear maps one after the other, of which one
    channel of l = 1 is wanted: together they are one number for each head and order |m| ≤ 1.
    """

    def forward(self, x: Tensor, geometry: Geometry, dropout: Tensor | None = None) -> Tensor:
        """Map (N, (L+1)², C) to (N, 3); ``dropout`` is for the signature."""
        if self.path == FAIRCHEM:
            return self.stock(x, geometry)[:, 1:4, 0]
        rows, convolution = self.rows, self.so2_conv_2
        orders = min(rows.mmax, 1)
        features, logits = self.features(x, geometry, orders)
        projection = self.proj.weight[1, 0]  # (heads · V,)

        def folded(weight: Tensor) -> Tensor:
            """Project the rows of l = 1 of a weight, for each head."""
            return (weight * projection[:, None]).unflatten(0, (self.num_heads, -1)).sum(dim=1)

        width = len(projection)
        of_zero = convolution.fc_m0
        bias = folded(of_zero.bias[width : 2 * width, None])[:, 0]
        parts = features.flatten(1).split(
            [size * self.hidden_channels for size in rows.sizes[: orders + 1]], dim=1
        )
        values = [F.linear(parts[0], folded(of_zero.weight[width : 2 * width]), bias)]
        if orders:
            real, imaginary = convolution.so2_m_conv[0].fc.weight.chunk(2)
            both = torch.cat([folded(real[:width]), folded(imaginary[:width])])
            values.append(F.linear(parts[1], real_weight(both)))
        joined = torch.cat(values, dim=1).unflatten(1, (-1, self.num_heads))  # m = 0, +1, -1
        weights = edge_weights(logits, geometry.edges)
        in_frame = (joined * weights[:, None]).sum(dim=2)  # (E, 3), or (E, 1) without orders above 0

        start, kept, columns = rows.blocks[1]
        block = geometry.wigner[:, start : start + kept * columns].unflatten(1, (kept, columns))
        order = [1, 2, 0] if orders else [0]  # m = 0, +1, -1 in a block of -1, 0, +1
        block = block[:, order] * rows.rescale[1]
        vectors = (block * in_frame[:, :, None]).sum(dim=1)
        unused = [self.proj.bias, *(one.fc.weight for one in convolution.so2_m_conv[orders:])]
        return with_zero_gradients(sum_over_edges(vectors, geometry.edges), unused)
