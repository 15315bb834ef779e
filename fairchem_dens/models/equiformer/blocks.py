"""What the model is put together from: embeddings of atoms and of their surroundings, and its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens.models.equiformer.activation import Gate
from fairchem_dens.models.equiformer.attention import GraphAttention
from fairchem_dens.models.equiformer.dropout import drop_path, dropout_channels
from fairchem_dens.models.equiformer.features import SCALAR, Features
from fairchem_dens.models.equiformer.graph import Edges
from fairchem_dens.models.equiformer.linear import Linear
from fairchem_dens.models.equiformer.norm import EquivariantLayerNorm
from fairchem_dens.models.equiformer.radial import RadialProfile
from fairchem_dens.models.equiformer.tensor_product import DepthwiseTensorProduct


class AtomEmbedding(nn.Module):
    """A vector of scalars for each element.

    Args:
        num_elements: atomic numbers below this are known.
        irreps: of the nodes; only the scalars are embedded.
    """

    def __init__(self, num_elements: int, irreps: o3.Irreps) -> None:
        super().__init__()
        self.atom_type_lin = Linear(o3.Irreps([(num_elements, SCALAR)]), irreps[:1])
        with torch.no_grad():
            self.atom_type_lin.tp["weight"] *= math.sqrt(num_elements)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """Map (N,) to (N, 1, C)."""
        # One row of the matrix: what the linear layer makes of a one-hot vector.
        row = self.atom_type_lin.matrices()[0].index_select(0, atomic_numbers)
        return (row + self.atom_type_lin.bias[0])[:, None]


class EdgeDegreeEmbedding(nn.Module):
    """Sums over neighbours what the direction and the distance to each of them say.

    The paper's code couples one learned vector of scalars, the same for all atoms, with the harmonics. Its
    other irreps are zero, so of all paths only those from scalars count, and those are products. The weights
    of the others are held, and get zero gradients.

    Args:
        irreps: of the nodes.
        irreps_edge: of the harmonics.
        fc_neurons: sizes of radial basis and hidden layers.
        avg_degree: the sum is divided by its square root.
    """

    def __init__(
        self, irreps: o3.Irreps, irreps_edge: o3.Irreps, fc_neurons: Sequence[int], avg_degree: float
    ) -> None:
        super().__init__()
        self.irreps, self.irreps_edge, self.avg_degree = irreps, irreps_edge, avg_degree
        product = DepthwiseTensorProduct(irreps, irreps_edge, irreps)
        self.from_scalars = [path for path in product.paths if path.source == 0]
        self.num_scalars = irreps[0].mul
        self.exp = Linear(o3.Irreps([(1, SCALAR)]), irreps[:1])
        # Paths from scalars come first, in the row of weights as among those that end in one irrep.
        needed = torch.arange(self.num_scalars * len(self.from_scalars))
        self.rad = RadialProfile([*fc_neurons, product.weight_numel], needed)
        self.proj = Linear(product.irreps_out, irreps)

    def forward(self, edges: Edges) -> Features:
        """Return features of ``irreps``, (N, 2l + 1, C)."""
        scalars = self.exp.tp["weight"] + self.exp.bias[0]
        weights = edges.weights(self.rad).unflatten(-1, (-1, self.num_scalars)) * scalars
        harmonics = edges.harmonics.split([ir.dim for _, ir in self.irreps_edge], dim=1)
        place_of = {path.ir: place for place, path in enumerate(self.from_scalars)}
        matrices = self.proj.matrices()
        mask = edges.mask.view(-1, 1)
        out = []
        for place, (mul, ir) in enumerate(self.irreps):
            if ir not in place_of:
                out.append(weights.new_zeros(len(edges.index), ir.dim, mul))
                continue
            channels = weights[:, place_of[ir]] @ matrices[place][: self.num_scalars]
            if ir == SCALAR:
                # Outside the product with the harmonic, which is one.
                channels = channels + self.proj.bias[0]
            edge = harmonics[self.from_scalars[place_of[ir]].edge]
            summed = edges.sum_over_neighbors(edge[:, :, None] * (channels * mask)[:, None])
            out.append(summed / math.sqrt(self.avg_degree))
        return out


class FeedForward(nn.Module):
    """Linear layer, gate, linear layer.

    Args:
        irreps_in, irreps_mid, irreps_out: of input, hidden features and output.
        proj_drop: dropout of the output.
    """

    def __init__(
        self, irreps_in: o3.Irreps, irreps_mid: o3.Irreps, irreps_out: o3.Irreps, proj_drop: float
    ) -> None:
        super().__init__()
        self.proj_drop = proj_drop
        self.gate = Gate(irreps_mid)
        self.fctp_1 = Linear(irreps_in, self.gate.irreps_in)
        self.fctp_2 = Linear(irreps_mid, irreps_out)

    def forward(self, x: Features) -> Features:
        """Map ``irreps_in`` to ``irreps_out``."""
        return dropout_channels(self.fctp_2(self.gate(self.fctp_1(x))), self.proj_drop, self.training)


class TransBlock(nn.Module):
    """Norm and attention, norm and feed-forward network, each added to its input.

    Args:
        irreps_in, irreps_out: of the nodes; if they differ, a linear layer stands in for the second input.
        irreps_edge: of the harmonics.
        irreps_mlp_mid: hidden features of the feed-forward network.
        drop_path_rate: how often a branch is dropped.
        attention: of `GraphAttention`.
    """

    def __init__(
        self,
        irreps_in: o3.Irreps,
        irreps_edge: o3.Irreps,
        irreps_out: o3.Irreps,
        *,
        irreps_mlp_mid: o3.Irreps,
        drop_path_rate: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm_1 = EquivariantLayerNorm(irreps_in)
        self.ga = GraphAttention(irreps_in, irreps_edge, irreps_in, **attention)
        self.norm_2 = EquivariantLayerNorm(irreps_in)
        self.ffn = FeedForward(irreps_in, irreps_mlp_mid, irreps_out, attention["proj_drop"])
        self.ffn_shortcut = Linear(irreps_in, irreps_out) if irreps_in != irreps_out else None

    def forward(self, x: Features, edges: Edges, batch: Tensor, size: int) -> Features:
        """Map ``irreps_in`` to ``irreps_out``; ``batch`` and ``size`` as in `drop_path`."""
        x = self._added(x, self.ga(self.norm_1(x), edges), batch, size)
        branch = self.ffn(self.norm_2(x))
        return self._added(x if self.ffn_shortcut is None else self.ffn_shortcut(x), branch, batch, size)

    def _added(self, x: Features, branch: Features, batch: Tensor, size: int) -> Features:
        branch = drop_path(branch, self.drop_path_rate, self.training, batch, size)
        return [one + other for one, other in zip(x, branch, strict=True)]
