"""The neighbour graph and the frames of its edges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairchem.core.common.utils import radius_graph_pbc
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import radius_graph

from fairchem_dens import keys
from fairchem_dens.models.inputs import check_cells
from fairchem_dens.ops.fused import neighbour_search

_SAME_DISTANCE = 1e-3
"""Å². Squared distances closer than this count as equal where neighbours have to be chosen."""


@dataclass(frozen=True)
class Graph:
    """Edges from sources to targets.

    Attributes:
        edge_index: (2, E) int64, source and target.
        vectors: (E, 3), from target to source, Å.
        distances: (E,), Å.
        at_most: how many edges lead to an atom at most, where that is certain.
    """

    edge_index: Tensor
    vectors: Tensor
    distances: Tensor
    at_most: int | None = None


def padded(graph: Graph, natoms: int, num_edges: int) -> Graph:
    """Return the graph with edges of one more atom, number ``natoms``, to itself.

    fairchem's convolutions cannot be empty. With the embedding of one more atom, which is left out of all
    outputs, they keep going, and with them the zero gradients that distributed training waits for.

    Args:
        graph: edges of ``natoms`` atoms.
        natoms: number of atoms, and of the one more.
        num_edges: how many edges to add, each of length √3 Å.
    """
    return Graph(
        torch.cat([graph.edge_index, graph.edge_index.new_full((2, num_edges), natoms)], dim=1),
        torch.cat([graph.vectors, graph.vectors.new_ones(num_edges, 3)]),
        torch.cat([graph.distances, graph.distances.new_full((num_edges,), math.sqrt(3))]),
    )


def build_graph(
    data: Any,
    *,
    cutoff: float,
    max_neighbors: int,
    strict: bool,
    use_pbc: bool,
    otf_graph: bool,
) -> Graph:
    """Find the neighbours of each atom in a prepared batch.

    Neighbours are searched in single precision, which is what fairchem's search knows; vectors and distances
    have the precision of the positions.

    Args:
        data: batch with ``pos``, ``natoms``, ``batch`` and, for periodic graphs, ``cell``.
        cutoff: Å.
        max_neighbors: the nearest ones are kept.
        strict: exactly ``max_neighbors`` at most, of those at the same distance the first ones by atom and
            image; else neighbours as far as the last one, to 0.01 Å, are kept too.
        use_pbc: consider periodic images.
        otf_graph: search; else use the stored edges if there are any.

    Raises:
        ValueError: stored edges are asked for but the positions were corrupted, or a periodic graph has no
            cell, or one that does not repeat in space.
    """
    # Mixed precision would round lattice vectors to a hundredth of an Å.
    with torch.autocast(data[keys.POS].device.type, enabled=False):
        pos, stored = data[keys.POS], not otf_graph and "edge_index" in data
        if stored and keys.NOISE_MASK in data:
            raise ValueError(
                "Stored edges do not belong to corrupted positions: set 'model.otf_graph: True'."
            )
        if not use_pbc:
            edge_index = data.edge_index if stored else _molecular_edges(data, cutoff, max_neighbors)
            offsets = None
        else:
            if keys.CELL not in data:
                raise ValueError(
                    f"The structures have no '{keys.CELL}' but 'model.use_pbc' is True: set it to False for "
                    "molecules."
                )
            if stored:
                edge_index, cell_offsets = data.edge_index, data.cell_offsets
            else:
                check_cells(data)
                edge_index, cell_offsets = _periodic_edges(data, cutoff, max_neighbors, strict)
            cells = data[keys.CELL].to(pos.dtype)[data[keys.BATCH][edge_index[1]]]
            offsets = torch.bmm(cell_offsets.to(pos.dtype)[:, None], cells)[:, 0]
        source, target = edge_index
        vectors = pos[source] - pos[target]
        if offsets is not None:
            vectors = vectors + offsets
        # fairchem's search for molecules may leave one too many, and stored edges may be anything.
        at_most = max_neighbors if strict and use_pbc and not stored else None
        return Graph(edge_index, vectors, torch.linalg.vector_norm(vectors, dim=-1), at_most)


def _periodic_edges(data: Any, cutoff: float, max_neighbors: int, strict: bool) -> tuple[Tensor, Tensor]:
    """Return edges (2, E) and, in lattice vectors, what to add to the positions of their sources (E, 3).

    fairchem's search looks one period beyond the cutoff, which is enough for atoms inside the cell only, and
    knows one periodicity for a whole batch. So it is given wrapped positions, and each periodicity by itself.
    Where there is a GPU that our own search runs on, that one finds the same edges.
    """
    batch, natoms = data[keys.BATCH], data[keys.NATOMS]
    pos, cell = data[keys.POS].detach(), data[keys.CELL].detach().to(data[keys.POS].dtype)
    pbc = data[keys.PBC].bool() if keys.PBC in data else cell.new_ones(len(natoms), 3, dtype=torch.bool)
    normals = torch.stack([torch.linalg.cross(cell[:, i - 2], cell[:, i - 1]) for i in range(3)], dim=1)
    volume = (cell[:, 0] * normals[:, 0]).sum(dim=-1)
    fractional = (normals[batch] @ pos[:, :, None])[..., 0] / volume[batch, None]
    # Selected, not multiplied: a structure that is not periodic may have a cell without volume.
    images = torch.where(pbc[batch], fractional.floor(), torch.zeros_like(fractional))
    wrapped = pos - (images[:, None] @ cell[batch])[:, 0]

    search = neighbour_search(pos.device)
    if search is not None:
        edge_index, offset = search(wrapped, cell, batch, natoms, pbc, cutoff, max_neighbors, strict)
        return edge_index, offset.to(pos.dtype) - images[edge_index[0]] + images[edge_index[1]]
    edges, offsets = [], []
    for periodicity in pbc.unique(dim=0):
        chosen = (pbc == periodicity).all(dim=1)
        atoms = chosen[batch].nonzero()[:, 0]
        part = Data(
            pos=wrapped[atoms].float(), cell=cell[chosen].float(), natoms=natoms[chosen], pbc=pbc[chosen]
        )
        # Not strictly: it keeps all at the same distance, and leaves the choice to us.
        found, cell_offsets, _ = radius_graph_pbc(part, cutoff, max_neighbors, False)
        edge_index = atoms[found]
        offset = cell_offsets.to(pos.dtype) - images[edge_index[0]] + images[edge_index[1]]
        if strict:
            source, target = edge_index
            vectors = pos[source] - pos[target] + (offset[:, None] @ cell[batch[target]])[:, 0]
            kept = _nearest(edge_index, offset.long(), (vectors**2).sum(dim=1), max_neighbors, len(pos))
            edge_index, offset = edge_index[:, kept], offset[kept]
        edges.append(edge_index)
        offsets.append(offset)
    return torch.cat(edges, dim=1), torch.cat(offsets)


def _nearest(edge_index: Tensor, offsets: Tensor, squared: Tensor, count: int, natoms: int) -> Tensor:
    """Tell which edges lead to the ``count`` nearest neighbours of each atom.

    In a crystal many are at the same distance. Left to rounding, the choice among them, and with it the
    prediction, would depend on what else is in the batch.

    Args:
        edge_index: (2, E).
        offsets: (E, 3) int64, in lattice vectors.
        squared: (E,), squared distances, Å².
        count: how many neighbours to keep.
        natoms: number of atoms.

    Returns:
        (E,) bool.
    """
    source, target = edge_index
    degrees = torch.zeros(natoms, dtype=torch.long, device=target.device)
    degrees.index_add_(0, target, torch.ones_like(target))
    starts = degrees.cumsum(0) - degrees

    def rank(order: Tensor) -> Tensor:
        """Number of edges to the same target that come before each one in an order."""
        order = order[torch.argsort(target[order], stable=True)]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return place - starts[target]

    is_last = rank(torch.argsort(squared, stable=True)) == count - 1
    last = squared.new_full((natoms,), float("inf"))
    last.scatter_reduce_(0, target, torch.where(is_last, squared, float("inf")), reduce="amin")
    nearer = squared < last[target] - _SAME_DISTANCE
    as_far = ~nearer & (squared <= last[target] + _SAME_DISTANCE)

    low = offsets.min() if len(offsets) else 0
    span = offsets.max() - low + 1 if len(offsets) else 1
    x, y, z = (offsets - low).unbind(dim=1)
    name = ((source * span + x) * span + y) * span + z
    # By atom and image among those that are as far; the others behind them.
    by_name = torch.argsort(name, stable=True)
    by_name = by_name[torch.argsort((~as_far[by_name]).long(), stable=True)]
    wanted = torch.full_like(degrees, count).index_add_(0, target, -nearer.long())
    return nearer | (as_far & (rank(by_name) < wanted[target]))


def _molecular_edges(data: Any, cutoff: float, max_neighbors: int) -> Tensor:
    return radius_graph(
        data[keys.POS].detach(), r=cutoff, batch=data[keys.BATCH], max_num_neighbors=max_neighbors
    )


def edge_frames(vectors: Tensor, *, random_roll: bool) -> Tensor:
    """Return rotations that turn each edge onto the y axis, where eSCN convolutions work.

    The roll about the edge is free. In training it is drawn from torch's global generator, which averages
    what little the grids of the S2 activation break of the symmetry; in evaluation it is fixed, so that a
    prediction is a function of the structure alone and no random number is used up.

    Args:
        vectors: (E, 3), none of them zero.
        random_roll: draw the roll.

    Returns:
        (E, 3, 3) without gradient, rows are the new axes.
    """
    vectors = vectors.detach()
    along = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # The coordinate axis least aligned with the edge is never parallel to it.
    helper = torch.zeros_like(along).scatter_(1, along.abs().argmin(dim=1, keepdim=True), 1.0)
    first = torch.linalg.cross(along, helper)
    first = first / torch.linalg.vector_norm(first, dim=-1, keepdim=True)
    if random_roll:
        angle = 2 * math.pi * torch.rand_like(along[:, :1])
        first = torch.cos(angle) * first + torch.sin(angle) * torch.linalg.cross(along, first)
    return torch.stack([first, along, torch.linalg.cross(first, along)], dim=1)
