"""Neighbours in molecules: a table with a row for each atom, and the geometry of its edges.

A row lists the other atoms of the molecule; a mask says which of them are within the cutoff. Molecules of one
size give tables of one shape, sums over neighbours are sums over a dimension, and nothing is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fairchem_dens.models.equiformer.features import Features
from fairchem_dens.models.equiformer.radial import RadialProfile
from fairchem_dens.models.equiformer.tensor_product import Couplings, DepthwiseTensorProduct, Path
from fairchem_dens.ops.gather import gather

COMPLETE_UP_TO = 64
"""Rows are longer than this only if atoms have that many neighbours within the cutoff."""


@dataclass(frozen=True)
class Neighbors:
    """Pairs of atoms that may be neighbours.

    Attributes:
        index: (N, K) int64, the other atom; the atom itself where the row is padded.
        is_pair: (N, K) bool, False where the row is padded.
        reverse: (N · K,) int64, where the pair stands with its atoms exchanged; where the row is padded, its
            own place.
    """

    index: Tensor
    is_pair: Tensor
    reverse: Tensor


def find_neighbors(
    pos: Tensor, natoms: Tensor, batch: Tensor, cutoff: float, largest: int | None = None
) -> Neighbors:
    """List the other atoms of each atom's structure; in large ones only those within the cutoff.

    Args:
        pos: (N, 3), Å.
        natoms: (B,).
        batch: (N,), ascending.
        cutoff: Å.
        largest: atoms of the largest structure, if that is known without asking the device.
    """
    longest = max((int(natoms.max()) if largest is None else largest) - 1, 1)
    place = torch.arange(longest, device=pos.device)
    starts = (natoms.cumsum(0) - natoms)[batch][:, None]
    own = torch.arange(len(pos), device=pos.device)[:, None]
    others = starts + place + (place >= own - starts)
    is_pair = place < (natoms[batch] - 1)[:, None]
    index = torch.where(is_pair, others, own)
    # In the row of the other, this atom is listed one place earlier if it comes behind it.
    column = torch.where(is_pair, own - starts - (own > others).long(), place)
    if longest > COMPLETE_UP_TO:
        pos = pos.detach()
        is_pair = is_pair & ((pos[index] - pos[:, None]).square().sum(dim=-1) < cutoff**2)
        longest = max(int(is_pair.sum(dim=1).max()), 1)
        # Stable: neighbours keep their order.
        order = is_pair.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        moved_to = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
        # Whether a pair is near enough does not depend on its order, to the last bit: both are kept.
        column = torch.where(is_pair, moved_to[index, column], place)
        index, is_pair, column = (one.gather(1, order[:, :longest]) for one in (index, is_pair, column))
        column = torch.where(is_pair, column, place[:longest])
        index = torch.where(is_pair, index, own)
    return Neighbors(index, is_pair, (index * longest + column).view(-1))


@dataclass(frozen=True)
class Edges:
    """What layers need to know of all pairs, E = N · K of them, row by row.

    Attributes:
        index: (N, K) int64, the neighbour.
        reverse: (E,) int64, the pair with its atoms exchanged.
        mask: (N, K) bool, whether it is within the cutoff.
        harmonics: (E, D).
        basis: (E, number), the distance in the radial basis.
        learns: the forces are differentiated again, by parameters only.
        hidden: for networks of the distance, what `hidden_features` made of the basis.
    """

    index: Tensor
    reverse: Tensor
    mask: Tensor
    harmonics: Tensor
    basis: Tensor
    learns: bool = False
    hidden: Mapping[RadialProfile, Tensor] = field(default_factory=dict)
    _couplings: dict[tuple[Path, ...], Couplings] = field(default_factory=dict)

    def couplings(self, product: DepthwiseTensorProduct) -> Couplings:
        """Return the matrices of a tensor product, computed once for all products with the same paths."""
        if product.paths not in self._couplings:
            self._couplings[product.paths] = product.couplings(self.harmonics)
        return self._couplings[product.paths]

    def coupled(self, product: DepthwiseTensorProduct, x: Features, weights: Tensor | None) -> Features:
        """Take the tensor product of features of the edges with their harmonics."""
        return product(x, self.couplings(product), weights, self.learns)

    def weights(self, profile: RadialProfile) -> Tensor:
        """Return what a network makes of the distances, (E, W)."""
        if profile in self.hidden:
            return profile.from_hidden(self.hidden[profile])
        return profile(self.basis)

    def constant(self) -> Edges:
        """Return the same, but with directions that gradients do not go back to."""
        couplings = {paths: [one.detach() for one in some] for paths, some in self._couplings.items()}
        return replace(self, harmonics=self.harmonics.detach(), _couplings=couplings)

    def of_neighbors(self, values: Tensor) -> Tensor:
        """Read (N, ...) at the neighbours of each atom: (N, K, ...)."""
        return gather(values, self.index, self.reverse).view(*self.index.shape, *values.shape[1:])

    def sum_over_neighbors(self, values: Tensor) -> Tensor:
        """Sum (E, ...) over the neighbours of each atom: (N, ...). Masked pairs must hold zeros."""
        return values.view(*self.index.shape, *values.shape[1:]).sum(dim=1)


def edge_vectors(pos: Tensor, neighbors: Neighbors, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return vectors from atoms to neighbours (E, 3), Å, and the mask (N, K) of those within the cutoff.

    Beyond the cutoff and where rows are padded the vector is a constant of that length: finite everywhere,
    without a gradient.
    """
    vectors = gather(pos, neighbors.index, neighbors.reverse).view(*neighbors.index.shape, 3) - pos[:, None]
    mask = neighbors.is_pair & (vectors.detach().square().sum(dim=-1) < cutoff**2)
    constant = F.pad(vectors.new_full((1,), cutoff), (2, 0))
    return torch.where(mask[..., None], vectors, constant).view(-1, 3), mask
