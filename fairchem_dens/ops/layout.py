"""Which coefficients an edge keeps, in which order, and the order of edges.

Node features have (L+1)² rows, degree by degree: row l² + l + m has degree l and order m. In the frame of an
edge only the orders |m| ≤ M are kept, and they are sorted by order first, because a convolution in SO(2)
mixes degrees but not orders (arXiv 2302.03655):

    [m = 0: l = 0..L | m = +1: l = 1..L | m = -1: l = 1..L | m = +2: l = 2..L | m = -2 ... ]

The coefficients of one order are then neighbours in memory, and a convolution is one matrix product for each
order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The kept coefficients of degree L and order M.

    Attributes:
        lmax: L.
        mmax: M, at most L.
    """

    lmax: int
    mmax: int

    def __post_init__(self) -> None:
        if not 0 <= self.mmax <= self.lmax:
            raise ValueError(f"mmax must be between 0 and lmax ({self.lmax}), found {self.mmax}.")

    @property
    def num_full(self) -> int:
        """(L+1)², rows of node features."""
        return (self.lmax + 1) ** 2

    @property
    def num_kept(self) -> int:
        """R, rows in the frame of an edge."""
        return len(self.degrees)

    @property
    def num_radial(self) -> int:
        """Rows of radial weights: +m and -m share theirs."""
        return sum(self.degrees_of(m) for m in range(self.mmax + 1))

    @property
    def num_packed(self) -> int:
        """P, entries of the packed rotation of an edge."""
        return sum(rows * columns for _, rows, columns in self.blocks)

    def degrees_of(self, order: int) -> int:
        """Number of degrees that have an order."""
        return self.lmax + 1 - abs(order)

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """Order of each kept row."""
        signed = [0] + [sign * m for m in range(1, self.mmax + 1) for sign in (1, -1)]
        return tuple(m for m in signed for _ in range(self.degrees_of(m)))

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degree of each kept row."""
        signed = [0] + [sign * m for m in range(1, self.mmax + 1) for sign in (1, -1)]
        return tuple(degree for m in signed for degree in range(abs(m), self.lmax + 1))

    @cached_property
    def full_rows(self) -> tuple[int, ...]:
        """Where each kept row is in node features."""
        return tuple(
            degree * (degree + 1) + order for degree, order in zip(self.degrees, self.orders, strict=True)
        )

    @cached_property
    def radial_rows(self) -> tuple[int, ...]:
        """Row of the radial weights that scales each kept row."""
        starts = [0, *accumulate(self.degrees_of(m) for m in range(self.mmax + 1))]
        return tuple(
            starts[abs(order)] + degree - abs(order)
            for degree, order in zip(self.degrees, self.orders, strict=True)
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of kept rows of order 0, of ±1, ..., of ±M."""
        return tuple(self.degrees_of(m) * (2 if m else 1) for m in range(self.mmax + 1))

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """For each degree: where its block of a packed rotation starts, its rows and its columns.

        A block has rows m = -min(l, M)..min(l, M) and columns m' = -l..l, row by row.
        """
        shapes = [(2 * min(degree, self.mmax) + 1, 2 * degree + 1) for degree in range(self.lmax + 1)]
        starts = [0, *accumulate(rows * columns for rows, columns in shapes)]
        return tuple((start, *shape) for start, shape in zip(starts, shapes, strict=False))

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """For each degree: the kept rows of m = -min(l, M)..min(l, M)."""
        where = {pair: row for row, pair in enumerate(zip(self.degrees, self.orders, strict=True))}
        return tuple(
            tuple(where[degree, m] for m in range(-min(degree, self.mmax), min(degree, self.mmax) + 1))
            for degree in range(self.lmax + 1)
        )

    @cached_property
    def rescale(self) -> tuple[float, ...]:
        """For each degree: what makes up for the orders that were left out, √((2l+1)/(2M+1)) for l > M."""
        return tuple(
            math.sqrt((2 * degree + 1) / (2 * self.mmax + 1)) if degree > self.mmax else 1.0
            for degree in range(self.lmax + 1)
        )

    @cached_property
    def packed_degrees(self) -> tuple[int, ...]:
        """Degree of each entry of a packed rotation."""
        return tuple(
            degree for degree, (_, rows, columns) in enumerate(self.blocks) for _ in range(rows * columns)
        )

    @cached_property
    def packed_orders(self) -> tuple[tuple[int, int], ...]:
        """Orders (m, m') of each entry of a packed rotation: of the kept row, and of the row of the node."""
        return tuple(
            (m, column)
            for degree in range(self.lmax + 1)
            for m in range(-min(degree, self.mmax), min(degree, self.mmax) + 1)
            for column in range(-degree, degree + 1)
        )


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor, made once for each device and type; not to be written to."""
    return torch.tensor(values, device=device, dtype=dtype)


@dataclass(frozen=True)
class Edges:
    """Edges of N nodes, sorted by target.

    Attributes:
        source: (E,) int64.
        target: (E,) int64, ascending.
        row_ptr: (N+1,) int64; the edges into node n are row_ptr[n] to row_ptr[n+1].
        by_source: (E,) int64, a stable order of the edges by their source.
        source_ptr: (N+1,) int64; the edges out of node n are by_source[source_ptr[n]:source_ptr[n+1]].
        in_degree: how many edges lead to every node, if it is the same number and known without asking the
            device; the edges into node n are then n · in_degree to (n + 1) · in_degree.
    """

    source: Tensor
    target: Tensor
    row_ptr: Tensor
    by_source: Tensor
    source_ptr: Tensor
    in_degree: int | None = None

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.row_ptr) - 1

    def __len__(self) -> int:
        return len(self.source)


def edges_from(source: Tensor, target: Tensor, num_nodes: int, at_most: int | None = None) -> Edges:
    """Return `Edges` without asking the device for anything.

    Args:
        source: (E,) int64.
        target: (E,) int64, ascending.
        num_nodes: N.
        at_most: edges into any node, if there is such a bound. With N · ``at_most`` edges in all, which is
            known from their shape, no node can have fewer.
    """
    by_source, source_ptr = torch.argsort(source, stable=True), _pointers(source, num_nodes)
    if at_most and len(target) == num_nodes * at_most:
        row_ptr = torch.arange(num_nodes + 1, device=target.device) * at_most
        return Edges(source, target, row_ptr, by_source, source_ptr, at_most)
    return Edges(source, target, _pointers(target, num_nodes), by_source, source_ptr)


def _pointers(index: Tensor, num_nodes: int) -> Tensor:
    counts = index.new_zeros(num_nodes + 1)
    return counts.index_add_(0, index + 1, torch.ones_like(index)).cumsum(0)
