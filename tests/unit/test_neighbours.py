"""Which neighbours an atom of a crystal has: many are at the same distance, more than are wanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ase.build import fcc111
from torch_geometric.data import Batch, Data

from fairchem_dens.data.lmdb import data_from_atoms
from fairchem_dens.models.equiformer_v2.geometry import edges_of as sorted_edges_of
from fairchem_dens.models.equiformer_v2.geometry import sorted_by_target
from fairchem_dens.models.graph import Graph, build_graph
from fairchem_dens.models.inputs import prepared

Edges = list[tuple[float, ...]]


@pytest.fixture
def crystal() -> Data:
    """Copper as it is cut: 12 nearest neighbours at 2.55 Å, 6 at 3.61 Å, 24 at 4.42 Å."""
    atoms = fcc111("Cu", size=(3, 3, 6), vacuum=4.0)
    atoms.pbc = True
    atoms.positions += [0.37, 0.11, 0.0]
    atoms.wrap()
    return data_from_atoms(atoms, sid=0, fid=0, energy=0.0, forces=0 * atoms.positions)


def graph_of(*structures: Data, strict: bool = True) -> tuple[Batch, Graph]:
    batch = prepared(Batch.from_data_list(list(structures)), 100)
    settings = {"cutoff": 6.0, "max_neighbors": 20, "use_pbc": True, "otf_graph": True}
    return batch, build_graph(batch, strict=strict, **settings)


def edges_of(place: int, *structures: Data, strict: bool = True) -> Edges:
    """Source, target and vector of each edge of one of the structures of a batch."""
    batch, graph = graph_of(*structures, strict=strict)
    of_it = batch.batch[graph.edge_index[1]] == place
    ends = graph.edge_index[:, of_it].T - int(batch.ptr[place])
    return sorted(map(tuple, torch.cat([ends, (100 * graph.vectors[of_it]).round()], dim=1).tolist()))


def test_the_rest_of_a_batch_does_not_matter(crystal: Data, structure: Callable[..., Data]) -> None:
    alone = edges_of(0, crystal)
    assert len(alone) == 20 * crystal.num_nodes
    small = crystal.clone()  # in a smaller cell, so that images farther away are looked at
    small.cell, small.natoms = crystal.cell / 3, 1
    for name in ("pos", "atomic_numbers", "fixed", "tags", "forces"):
        small[name] = crystal[name][:1]
    others = [structure(0), small, structure(1), small]
    for place in range(5):
        assert edges_of(place, *others[:place], crystal, *others[place:]) == alone


def test_as_many_into_each_atom_where_it_is_certain(crystal: Data, structure: Callable[..., Data]) -> None:
    def known(*structures: Data, strict: bool = True) -> int | None:
        batch, graph = graph_of(*structures, strict=strict)
        return sorted_edges_of(sorted_by_target(graph), batch.num_nodes).in_degree

    lonely = structure(0)
    lonely.cell = lonely.cell * 10
    lonely.pos = lonely.pos * 10
    assert known(crystal) == known(crystal, crystal) == 20
    assert known(crystal, strict=False) is None
    assert known(crystal, lonely) is None
    batch, graph = graph_of(crystal)
    batch.edge_index = graph.edge_index
    batch.cell_offsets = torch.zeros(graph.edge_index.shape[1], 3)
    stored = build_graph(batch, cutoff=6.0, max_neighbors=20, strict=True, use_pbc=True, otf_graph=False)
    assert stored.at_most is None


def test_rounding_does_not_matter(crystal: Data) -> None:
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    turned = crystal.clone()
    turned.pos, turned.cell = crystal.pos @ turn + 1e-6, crystal.cell @ turn
    (_, graph), (_, other) = graph_of(crystal), graph_of(turned)
    assert torch.equal(graph.edge_index, other.edge_index)
    torch.testing.assert_close(graph.vectors @ turn, other.vectors, atol=1e-4, rtol=0)


def test_they_are_the_nearest(crystal: Data, structure: Callable[..., Data]) -> None:
    for data in (crystal, structure(0)):
        _, strict = graph_of(data)
        _, generous = graph_of(data, strict=False)
        for atom in range(data.num_nodes):
            chosen = strict.distances[strict.edge_index[1] == atom].sort().values
            possible = generous.distances[generous.edge_index[1] == atom].sort().values
            assert len(chosen) == min(20, len(possible))
            torch.testing.assert_close(chosen, possible[: len(chosen)], atol=1e-3, rtol=0)
