"""What all layers share: the edges of a batch, their frames and what radial functions see of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fairchem_dens.models.graph import Graph
from fairchem_dens.ops.layout import Edges, Rows, edges_from
from fairchem_dens.ops.radial import EdgeInputs


@dataclass(frozen=True)
class StockInputs:
    """What fairchem's own modules take besides node features; their rotations are set in place.

    Attributes:
        atomic_numbers: (N,).
        edge_features: (E, inputs of the radial functions).
        edge_index: (2, E).
    """

    atomic_numbers: Tensor
    edge_features: Tensor
    edge_index: Tensor


@dataclass(frozen=True)
class Geometry:
    """The edges of a batch.

    Attributes:
        edges: sorted by target.
        wigner: (E, P), packed rotations into the frames of the edges.
        inputs: of radial functions.
        shared_embeddings: of elements, for sources and targets, if the blocks have none of their own.
        make_stock_inputs: what modules on fairchem's path are given is made when the first one asks.
    """

    edges: Edges
    wigner: Tensor
    inputs: EdgeInputs
    shared_embeddings: tuple[Tensor, Tensor] | None
    make_stock_inputs: Callable[[], StockInputs]

    @cached_property
    def stock(self) -> StockInputs:
        """The inputs of fairchem's modules."""
        return self.make_stock_inputs()


def sorted_by_target(graph: Graph) -> Graph:
    """Return the graph with its edges in a stable order of their targets."""
    order = torch.argsort(graph.edge_index[1], stable=True)
    return Graph(graph.edge_index[:, order], graph.vectors[order], graph.distances[order], graph.at_most)


def edges_of(graph: Graph, natoms: int) -> Edges:
    """Return the edges of a graph that is sorted by target."""
    source, target = graph.edge_index
    return edges_from(source.contiguous(), target.contiguous(), natoms, graph.at_most)


class Grids(nn.Module):
    """Transforms between coefficients and points on the sphere, constants in the layout of `Rows`.

    Attributes:
        to_grid, from_grid: (G, R), for features in the frames of edges.
        node_to_grid, node_from_grid: (G, (L+1)²), for features of nodes.
    """

    to_grid: Tensor
    from_grid: Tensor
    node_to_grid: Tensor
    node_from_grid: Tensor

    def __init__(self, so3_grid: nn.Module, rows: Rows) -> None:
        super().__init__()
        lmax, mmax = rows.lmax, rows.mmax
        grids: list[list[nn.Module]] = so3_grid  # type: ignore[assignment]  # a module list of module lists
        # fairchem sorts kept rows by degree.
        by_degree = sorted(range(rows.num_kept), key=lambda row: rows.full_rows[row])
        order = torch.tensor(by_degree).argsort()
        for prefix, grid, index in (("", grids[lmax][mmax], order), ("node_", grids[lmax][lmax], None)):
            for name in ("to_grid", "from_grid"):
                table = getattr(grid, f"{name}_mat").flatten(0, 1)
                self.register_buffer(prefix + name, table[:, index] if index is not None else table.clone())

    def of_edges(self, highest_order: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """To the grid from all kept rows, and back from it to those of order ≤ ``highest_order``."""
        return self.to_grid, self.from_grid[:, : sum(rows.sizes[: highest_order + 1])]
