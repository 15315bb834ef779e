"""The fused search finds the edges that the plain one finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from fairchem_dens.models.graph import Graph, build_graph
from fairchem_dens.models.inputs import prepared
from fairchem_dens.ops import fused


def edges(graph: Graph) -> list[tuple[float, ...]]:
    """Source, target and vector of each edge, in hundredths of an Å."""
    rounded = (100 * graph.vectors.cpu()).round()
    return sorted(map(tuple, torch.cat([graph.edge_index.cpu().T, rounded], dim=1).tolist()))


def crystal(pbc: tuple[bool, ...] = (True, True, True)) -> Data:
    """Two atoms of a cubic lattice with many neighbours at the same distance, one outside of the cell."""
    return Data(
        pos=torch.tensor([[0.1, 0.2, 0.3], [1.6, 1.7, 6.3]]), cell=3 * torch.eye(3)[None], natoms=2,
        atomic_numbers=torch.tensor([29, 8]), pbc=torch.tensor([pbc]), tags=torch.tensor([1, 1]),
        fixed=torch.tensor([0.0, 0.0]), sid=0, fid=0,
    )  # fmt: skip


@pytest.fixture(params=["a crystal", "layers and a molecule", "one atom"])
def batch(request: pytest.FixtureRequest) -> Batch:
    lone = crystal((False, False, False))
    for name in ("pos", "atomic_numbers", "tags", "fixed"):
        lone[name] = lone[name][:1]
    lone.natoms = 1
    structures = {
        "a crystal": [crystal()],
        "layers and a molecule": [crystal((True, False, True)), crystal((False, False, False))],
        "one atom": [lone],
    }[request.param]
    return prepared(Batch.from_data_list(structures), 100)


@pytest.mark.parametrize(
    ("wanted", "strict"),
    [
        (5, True),
        pytest.param(12, True, marks=pytest.mark.slow),
        pytest.param(5, False, marks=pytest.mark.slow),
        pytest.param(12, False, marks=pytest.mark.slow),
    ],
)
def test_edges(batch: Batch, wanted: int, strict: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"cutoff": 4.0, "max_neighbors": wanted, "use_pbc": True, "otf_graph": True}
    monkeypatch.setenv(fused.SWITCH, "plain")
    expected = build_graph(batch, strict=strict, **settings)
    monkeypatch.setenv(fused.SWITCH, "fused")
    found = build_graph(batch.clone().to(device), strict=strict, **settings)
    assert edges(found) == edges(expected)
    target = found.edge_index[1]
    assert (target[1:] >= target[:-1]).all()


@pytest.mark.slow
def test_edges_of_a_slab(
    structure: Callable[..., Data], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prepared(Batch.from_data_list([structure(seed, natoms=4 + seed) for seed in range(2)]), 100)
    settings: dict[str, Any] = {"cutoff": 6.0, "max_neighbors": 20, "use_pbc": True, "otf_graph": True}
    monkeypatch.setenv(fused.SWITCH, "plain")
    expected = build_graph(batch, strict=True, **settings)
    monkeypatch.setenv(fused.SWITCH, "fused")
    assert edges(build_graph(batch.clone().to(device), strict=True, **settings)) == edges(expected)
