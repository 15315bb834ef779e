"""Graph attention: messages from neighbours, weighted by an attention network.

Source: Liao and Smidt, Equiformer, arXiv 2206.11990, section 4.2 (MLP attention with nonlinear messages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens.models.equiformer.activation import Gate, smooth_leaky_relu
from fairchem_dens.models.equiformer.dropout import dropout_channels
from fairchem_dens.models.equiformer.features import SCALAR, Features
from fairchem_dens.models.equiformer.graph import Edges
from fairchem_dens.models.equiformer.linear import Linear
from fairchem_dens.models.equiformer.radial import RadialProfile
from fairchem_dens.models.equiformer.tensor_product import DepthwiseTensorProduct


class GatedConvolution(nn.Module):
    """The first half of a message: a tensor product weighted by the distance, a linear layer, a gate."""

    def __init__(self, irreps: o3.Irreps, irreps_edge: o3.Irreps, fc_neurons: Sequence[int]) -> None:
        super().__init__()
        self.dtp = DepthwiseTensorProduct(irreps, irreps_edge, irreps)
        self.dtp_rad = RadialProfile([*fc_neurons, self.dtp.weight_numel], self.dtp.weight_order)
        self.gate = Gate(irreps)
        self.lin = Linear(self.dtp.irreps_out, self.gate.irreps_in)

    def convolve(self, x: Features, edges: Edges) -> Features:
        """Return the weighted tensor product, irreps ``dtp.irreps_out``."""
        return edges.coupled(self.dtp, x, edges.weights(self.dtp_rad))

    def activate(self, x: Features) -> Features:
        """Mix the channels and apply the gate."""
        return self.gate(self.lin(x))


class ValueConvolution(nn.Module):
    """The second half of a message: tensor product with learned weights, then a linear layer."""

    def __init__(self, irreps: o3.Irreps, irreps_edge: o3.Irreps, irreps_out: o3.Irreps) -> None:
        super().__init__()
        self.dtp = _LearnedProduct(irreps, irreps_edge, irreps_out)
        self.lin = Linear(self.dtp.irreps_out, irreps_out)

    def forward(self, x: Features, edges: Edges) -> Features:
        """Map edges of ``irreps`` to edges of ``irreps_out``."""
        # The same for all edges, so the linear layer takes them over.
        weights = self.dtp.tp["weight"].index_select(0, self.dtp.weight_order)
        scales = weights.split([mul for mul, _ in self.dtp.irreps_out])
        return self.lin(edges.coupled(self.dtp, x, None), scales)


class _LearnedProduct(DepthwiseTensorProduct):
    """A tensor product that holds one weight for each path and channel, ``tp.weight``."""

    def __init__(self, irreps_in: o3.Irreps, irreps_edge: o3.Irreps, irreps_wanted: o3.Irreps) -> None:
        super().__init__(irreps_in, irreps_edge, irreps_wanted)
        self.tp = nn.ParameterDict({"weight": nn.Parameter(torch.randn(self.weight_numel))})


class GraphAttention(nn.Module):
    """Attention over the neighbours of each atom.

    Args:
        irreps_in, irreps_out: of the atoms.
        irreps_edge: of the harmonics.
        irreps_pre_attn: of messages; None for ``irreps_in``.
        irreps_head: of one head.
        num_heads: heads.
        fc_neurons: sizes of radial basis and hidden layers.
        alpha_drop, proj_drop: dropout of attention weights and of the output.
    """

    def __init__(
        self,
        irreps_in: o3.Irreps,
        irreps_edge: o3.Irreps,
        irreps_out: o3.Irreps,
        *,
        irreps_pre_attn: o3.Irreps | None,
        irreps_head: o3.Irreps,
        num_heads: int,
        fc_neurons: Sequence[int],
        alpha_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.alpha_drop, self.proj_drop = num_heads, alpha_drop, proj_drop
        messages = irreps_in if irreps_pre_attn is None else irreps_pre_attn
        heads = o3.Irreps([(num_heads * mul, ir) for mul, ir in irreps_head])
        scalars = irreps_head.count(SCALAR)
        bound = math.sqrt(6 / (num_heads + scalars))
        self.alpha_dot = nn.Parameter(torch.empty(1, num_heads, scalars).uniform_(-bound, bound))
        self.merge_src = Linear(irreps_in, messages)
        self.merge_dst = Linear(irreps_in, messages, bias=False)
        self.sep_act = GatedConvolution(messages, irreps_edge, fc_neurons)
        self.sep_alpha = Linear(self.sep_act.dtp.irreps_out, heads[:1])
        self.sep_value = ValueConvolution(messages, irreps_edge, heads)
        self.proj = Linear(heads, irreps_out)

    def forward(self, x: Features, edges: Edges) -> Features:
        """Map atoms of ``irreps_in`` to atoms of ``irreps_out``; zero and a bias without neighbours."""
        message = [
            (edges.of_neighbors(source) + target[:, None]).flatten(0, 1)
            for source, target in zip(self.merge_src(x), self.merge_dst(x), strict=True)
        ]
        message = self.sep_act.convolve(message, edges)
        alpha = self._attention(self.sep_alpha(message)[0], edges.mask)
        values = self.sep_value(self.sep_act.activate(message), edges)
        attended = [
            edges.sum_over_neighbors(value.unflatten(-1, (self.num_heads, -1)) * alpha).flatten(-2)
            for value in values
        ]
        out = self.proj(attended)
        if self.proj.irreps_out[0].ir != SCALAR:
            # A zero gradient rather than none: distributed training waits for that of each parameter.
            out[0] = out[0] + 0.0 * self.sep_value.lin.bias[0].sum()
        return dropout_channels(out, self.proj_drop, self.training)

    def _attention(self, scalars: Tensor, mask: Tensor) -> Tensor:
        """Return weights of the edges (E, 1, heads, 1) that sum to one over neighbours; zero where masked."""
        per_head = scalars.view(*mask.shape, *self.alpha_dot.shape[1:])
        logits = (smooth_leaky_relu(per_head) * self.alpha_dot).sum(dim=-1)
        # Not −inf: the softmax of a row without any neighbour must have a gradient.
        lowest = torch.finfo(logits.dtype).min
        alpha = torch.softmax(logits.masked_fill(~mask[..., None], lowest), dim=1) * mask[..., None]
        return F.dropout(alpha, self.alpha_drop, self.training).view(-1, 1, self.num_heads, 1)
