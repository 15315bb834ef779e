"""Symmetries that EquiformerV2 has up to its grids, the frames of edges, and the graph that eSCN shares.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerV2DeNS, graph
from fairchem_dens.models.equiformer_v2 import memory, paths
from model_cases import disturbed
from outputs import assert_close, predict, rotation_errors
from precision import default_precision, double_precision

ROUNDING = 1e-11
"""Relative to the largest output; sums over a hundred neighbours in two layers stay below."""

few_examples = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with double_precision(monkeypatch):
        yield


@pytest.fixture(scope="module")
def arguments(model_settings: dict[str, Any]) -> dict[str, Any]:
    """All neighbours within the cutoff: which of two equally far ones to drop is no question of symmetry."""
    return model_settings | {"max_neighbors": 500, "max_radius": 4.0, "num_layers": 2}


@default_precision(torch.float64)
def make_model(arguments: dict[str, Any], **changes: Any) -> EquiformerV2DeNS:
    """A model in evaluation mode whose biases and norms are not the zeros and ones that they start as."""
    torch.manual_seed(0)
    return disturbed(EquiformerV2DeNS(**arguments | changes)).eval()


@pytest.fixture(scope="module", params=[*memory.LEVELS, paths.FAIRCHEM])
def model(arguments: dict[str, Any], request: pytest.FixtureRequest) -> EquiformerV2DeNS:
    """With gates instead of grids, which makes all of it equivariant up to rounding; on each path."""
    levels = {"recompute": request.param} if request.param in memory.LEVELS else {}
    model = make_model(arguments, use_gate_act=True, use_grid_mlp=False, **levels)
    if request.param == paths.FAIRCHEM:
        paths.choose(model, paths.FAIRCHEM)
    return model


class TestRotation:
    @given(seeds)
    @few_examples
    def test_exact_with_gates(self, model, batch, seed):
        torch.manual_seed(seed)
        assert max(rotation_errors(model, batch, o3.rand_matrix()).values()) < ROUNDING

    @pytest.mark.parametrize(
        "orders", [{"lmax_list": [2], "mmax_list": [2]}, {"lmax_list": [3], "mmax_list": [2]}]
    )
    def test_error_shrinks_with_grid_resolution(self, arguments, batch, orders):
        """Up to what the S2 activation aliases.

        A grid represents the harmonics up to lmax exactly, but SiLU makes higher ones of them, and those
        that a grid of R points cannot tell from lower ones are the error. SiLU is analytic, so their size
        falls geometrically with R: by a hundred or more from each of these resolutions to the next.
        """
        tolerance = {8: 1e-1, 14: 1e-3, 20: 1e-5}
        matrices = [o3.rand_matrix() for _ in range(3)]
        worst = {}
        for resolution in tolerance:
            model = make_model(arguments, grid_resolution=resolution, **orders)
            worst[resolution] = max(
                max(rotation_errors(model, batch, matrix).values()) for matrix in matrices
            )
        assert all(worst[resolution] < tolerance[resolution] for resolution in tolerance), worst
        assert worst[20] < worst[14] / 30 and worst[14] < worst[8] / 30, worst

    def test_roll_about_the_edge_does_not_matter(self, model, batch, monkeypatch):
        """Why it may be random in training and fixed in evaluation."""
        expected = predict(model, batch)
        frames = graph.edge_frames
        monkeypatch.setattr(
            "fairchem_dens.models.equiformer_v2.model.edge_frames",
            lambda vectors, random_roll: frames(vectors, random_roll=True),
        )
        assert_close(predict(model, batch), expected, ROUNDING)

    def test_mirror_images_are_told_apart(self, model, batch):
        """The symmetry is that of rotations alone: messages in the frames of edges mix parities."""
        assert rotation_errors(model, batch, -torch.eye(3))["forces"] > 1e-2


class TestEdgeFrames:
    @given(seeds, st.booleans())
    def test_are_rotations_that_turn_edges_onto_y(self, seed, random_roll):
        vectors = 5 * torch.randn(50, 3, generator=torch.Generator().manual_seed(seed))
        frames = graph.edge_frames(vectors, random_roll=random_roll)
        identity = torch.eye(3).expand(50, 3, 3)
        torch.testing.assert_close(frames @ frames.transpose(1, 2), identity, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.linalg.det(frames), torch.ones(50), rtol=0, atol=1e-12)
        expected = torch.zeros(50, 3)
        expected[:, 1] = vectors.norm(dim=1)
        torch.testing.assert_close((frames @ vectors[:, :, None])[..., 0], expected, rtol=0, atol=1e-12)

    def test_edges_along_axes_and_diagonals(self):
        vectors = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
        vectors = vectors[vectors.abs().sum(dim=1) > 0]
        frames = graph.edge_frames(vectors, random_roll=False)
        torch.testing.assert_close(frames[:, 1], vectors / vectors.norm(dim=1, keepdim=True))
        torch.testing.assert_close(torch.linalg.det(frames), torch.ones(26))

    def test_random_roll_is_drawn_anew_and_the_fixed_one_is_not(self):
        vectors = torch.randn(5, 3)
        assert not torch.equal(*(graph.edge_frames(vectors, random_roll=True) for _ in range(2)))
        assert torch.equal(*(graph.edge_frames(vectors, random_roll=False) for _ in range(2)))


@pytest.mark.parametrize("use_pbc", [True, False])
def test_mixed_precision_does_not_round_the_graph(batch, use_pbc):
    """Half precision knows a lattice vector of 20 Å to a hundredth of an Å only."""
    settings = {"cutoff": 6.0, "max_neighbors": 500, "strict": True, "use_pbc": use_pbc, "otf_graph": True}
    expected = graph.build_graph(batch, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graph.build_graph(batch, **settings)
    assert torch.equal(found.edge_index, expected.edge_index)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-12)


class TestImages:
    def test_atoms_are_not_wrapped_where_the_structure_is_not_periodic(self, model, make):
        data = make(0)
        data.pbc = torch.tensor([[True, True, False]])
        single = Batch.from_data_list([data])
        moved = single.clone()
        moved.pos[-1] = moved.pos[-1] + single.cell[0, 2]
        change = predict(model, moved)["forces"] - predict(model, single)["forces"]
        assert change.abs().max() > 1e-3

    def test_another_choice_of_cell_vectors(self, model, batch):
        """a, b and b + a span the same lattice."""
        sheared = batch.clone()
        sheared.cell[:, 1] += batch.cell[:, 0]
        assert_close(predict(model, sheared), predict(model, batch), ROUNDING)


@pytest.fixture(scope="module")
def molecular(arguments: dict[str, Any]) -> EquiformerV2DeNS:
    return make_model(arguments, use_pbc=False)


@pytest.fixture(scope="module")
def periodic(arguments: dict[str, Any]) -> EquiformerV2DeNS:
    return make_model(arguments, use_pbc=True)


@pytest.fixture(scope="module")
def stored(arguments: dict[str, Any]) -> EquiformerV2DeNS:
    """Of the same parameters as ``model``."""
    return make_model(arguments, use_gate_act=True, use_grid_mlp=False, otf_graph=False)


class TestMolecules:
    @pytest.fixture
    def structures(self, make) -> list[Data]:
        return [make(0), make(1, natoms=7)]

    def test_a_cell_is_not_looked_at(self, molecular, structures):
        with_cell = predict(molecular, Batch.from_data_list(structures))
        for data in structures:
            del data.cell, data.pbc
        assert_close(predict(molecular, Batch.from_data_list(structures)), with_cell, ROUNDING)

    def test_not_periodic_as_in_a_huge_box(self, periodic, structures):
        boxed = [data.clone() for data in structures]
        for data, box in zip(structures, boxed, strict=True):
            data.pbc = torch.tensor([[False, False, False]])
            box.cell = 1000 * torch.eye(3)[None]
        assert_close(
            predict(periodic, Batch.from_data_list(structures)),
            predict(periodic, Batch.from_data_list(boxed)),
            ROUNDING,
        )

    def test_periodic_graph_without_a_cell_is_refused(self, periodic, structures):
        for data in structures:
            del data.cell
        with pytest.raises(ValueError, match=r"'cell'.*use_pbc"):
            predict(periodic, Batch.from_data_list(structures))


class TestStoredEdges:
    def test_give_what_a_search_gives(self, stored, model, structure, arguments):
        batch = Batch.from_data_list([structure(0, dtype=torch.float64), structure(1, dtype=torch.float64)])
        search = batch.clone()
        search.pos, search.cell = search.pos.float(), search.cell.float()
        batch.edge_index, batch.cell_offsets, batch.neighbors = graph.radius_graph_pbc(search, 4.0, 500, True)
        assert_close(predict(stored, batch), predict(model, batch), ROUNDING)
        batch.edge_index, batch.cell_offsets = batch.edge_index[:, :5], batch.cell_offsets[:5]
        assert (predict(stored, batch)["energy"] - predict(model, batch)["energy"]).abs().max() > 1e-6

    def test_of_corrupted_structures_are_refused(self, stored, batch):
        batch.edge_index = torch.zeros(2, 1, dtype=torch.long)
        with pytest.raises(ValueError, match="otf_graph: True"):
            predict(stored, batch)


def test_an_atom_far_above_the_slab_does_not_disturb_it(model, make):
    slab = make(0, natoms=9)
    slab.pbc = torch.tensor([[True, True, False]])
    both = slab.clone()
    for name in (
        "pos",
        "condition_forces",
        "forces",
        "atomic_numbers",
        "fixed",
        "tags",
        "noise_mask",
        "sigmas",
    ):
        both[name] = torch.cat([slab[name], slab[name][-1:]])
    both.natoms = 10
    # In a skewed cell other images of it pass above other places, all as far away.
    both.pos[-1, 2] += 100
    with_atom, without = (
        predict(model, Batch.from_data_list([both])),
        predict(model, Batch.from_data_list([slab])),
    )
    for name in ("forces", "noise"):
        torch.testing.assert_close(with_atom[name][:9], without[name], rtol=0, atol=ROUNDING)
        assert torch.isfinite(with_atom[name]).all()
