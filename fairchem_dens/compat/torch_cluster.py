"""Stand-in for torch_cluster: the radius search that graphs without periodicity are built with.

`torch_geometric.nn.radius_graph`, which fairchem calls with `use_pbc: False`, ends here: through
`torch_cluster.radius_graph` up to torch_geometric 2.7, through the operator `pyg::radius` from 2.8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_dens.compat.absent import absent_function

__version__ = "0+fairchem.dens"

MAX_PAIRS = 2**24
"""Pairs of points whose distances are held in memory at a time."""


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """Connects the points of each example that are closer than `r`.

    Args:
        x: Positions (N, D).
        r: Radius; points at exactly `r` are not connected, as in torch_cluster.
        batch: Example of each point (N,), sorted; by default all belong to one.
        loop: Whether a point is its own neighbour.
        max_num_neighbors: Upper bound on the neighbours of a point. The nearest are kept, at equal distance
            those of lower index. (torch_cluster keeps those that it finds first, and may return one too
            many.) None: no bound.
        flow: `source_to_target`: the second row of the result holds the point whose neighbours are bounded;
            `target_to_source`: the first.
        num_workers: Ignored.
        batch_size: Ignored; examples without points have no edges.

    Returns:
        Edges (2, E), sorted by the point whose neighbours are bounded, then by neighbour.

    Raises:
        ValueError: If `flow` is none of the two or `batch` is not sorted.
    """
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f"flow must be 'source_to_target' or 'target_to_source', found {flow!r}.")
    target_and_source = radius(x, x, r, batch, batch, max_num_neighbors, ignore_same_index=not loop)
    return target_and_source.flip(0) if flow == "source_to_target" else target_and_source


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int | None = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Tensor:
    """Finds for each point of `y` the points of `x` in the same example that are closer than `r`.

    Args:
        x: Points to find (N, D).
        y: Points to search around (M, D).
        r: Radius, exclusive.
        batch_x: Example of each point of `x` (N,), sorted; by default all belong to one.
        batch_y: The same for `y` (M,).
        max_num_neighbors: As for `radius_graph`.
        num_workers: Ignored.
        batch_size: Ignored.
        ignore_same_index: Whether the pair of the i-th point of `x` and the i-th of `y` is left out.

    Returns:
        Pairs (2, P): index into `y`, index into `x`; sorted.

    Raises:
        ValueError: If a batch vector is not sorted.
    """
    x, y = (points.unsqueeze(-1) if points.dim() == 1 else points for points in (x, y))
    batch_x = _checked_batch(batch_x, x, "batch_x")
    batch_y = _checked_batch(batch_y, y, "batch_y")
    first = torch.searchsorted(batch_x, batch_y)
    count = torch.searchsorted(batch_x, batch_y, right=True) - first
    pairs_so_far = count.cumsum(0)
    if pairs_so_far.numel() == 0:
        return first.new_empty(2, 0)

    found = []
    start = 0
    while start < len(y):
        before = int(pairs_so_far[start - 1]) if start else 0
        # As many rows of the distance table as fit, at least one.
        stop = max(int(torch.searchsorted(pairs_so_far, before + MAX_PAIRS, right=True)), start + 1)
        rows = slice(start, stop)
        found.append(_search(x, y, r, start, first[rows], count[rows], max_num_neighbors, ignore_same_index))
        start = stop
    return torch.cat(found, dim=1)


def register_pyg_radius() -> None:
    """Registers `radius` as the operator `pyg::radius`, which torch_geometric 2.8 and later call."""
    if hasattr(torch.ops.pyg, "radius"):  # type: ignore[attr-defined]  # torch 2.4 exports it implicitly
        return
    library = torch.library.Library("pyg", "FRAGMENT")
    library.define(
        "radius(Tensor x, Tensor y, Tensor? ptr_x, Tensor? ptr_y, float r, int? max_num_neighbors=32, "
        "int num_workers=1, bool ignore_same_index=False) -> Tensor"
    )
    library.impl("radius", _pyg_radius, "CompositeExplicitAutograd")
    _libraries.append(library)


# An operator lives as long as the library object that it was defined by.
_libraries: list[torch.library.Library] = []


def _pyg_radius(
    x: Tensor,
    y: Tensor,
    ptr_x: Tensor | None,
    ptr_y: Tensor | None,
    r: float,
    max_num_neighbors: int | None = 32,
    num_workers: int = 1,
    ignore_same_index: bool = False,
) -> Tensor:
    batch_x, batch_y = (
        None if ptr is None else torch.repeat_interleave(ptr.diff()) for ptr in (ptr_x, ptr_y)
    )
    return radius(x, y, r, batch_x, batch_y, max_num_neighbors, ignore_same_index=ignore_same_index)


def __getattr__(name: str) -> object:
    # Any other function of the package, so that importing it does not fail where it is never called.
    if name.startswith("_"):
        raise AttributeError(f"module 'torch_cluster' has no attribute {name!r}")
    return absent_function("torch-cluster", name)


def _checked_batch(batch: Tensor | None, points: Tensor, name: str) -> Tensor:
    if batch is None:
        return torch.zeros(len(points), dtype=torch.long, device=points.device)
    if bool((batch.diff() < 0).any()):
        raise ValueError(f"{name} must be sorted: the points of one example follow each other.")
    return batch.contiguous()


@torch.no_grad()
def _search(
    x: Tensor,
    y: Tensor,
    r: float,
    offset: int,
    first: Tensor,
    count: Tensor,
    max_num_neighbors: int | None,
    ignore_same_index: bool,
) -> Tensor:
    """`radius` for consecutive points of `y` from `offset` on; `first` and `count`: where in `x`."""
    row = torch.repeat_interleave(count)
    start_of_row = count.cumsum(0) - count
    source = torch.arange(len(row), device=row.device) - start_of_row[row] + first[row]
    target = row + offset
    squared = (x[source] - y[target]).square().sum(-1)
    near = squared < r * r
    if ignore_same_index:
        near &= source != target
    source, target, row, squared = source[near], target[near], row[near], squared[near]

    if max_num_neighbors is not None:
        # Stable, so that equal distances stay in the order of the index.
        by_distance = squared.argsort(stable=True)
        order = by_distance[row[by_distance].argsort(stable=True)]
        neighbours = torch.bincount(row, minlength=len(count))
        rank = torch.arange(len(row), device=row.device) - (neighbours.cumsum(0) - neighbours)[row]
        keep = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        keep[order] = rank < max_num_neighbors
        source, target = source[keep], target[keep]
    return torch.stack([target, source])
