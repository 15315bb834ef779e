"""Symmetries of the whole model, in all three modes, and what it must leave alone.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerV2DeNS, graph

ROUNDING = 1e-11
"""Energies are some 0.1, forces and noise some 1; sums over a hundred neighbours in two layers stay below."""

VECTORS = ("pos", "cell", "condition_forces")
OUTPUTS = ("energy", "forces", "noise")

few_examples = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@contextmanager
def default_precision(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fairchem's grids and Wigner matrices have the default precision; its search knows only single."""
    search = default_precision(torch.float32)(graph.radius_graph_pbc)
    monkeypatch.setattr(graph, "radius_graph_pbc", search)
    with default_precision(torch.float64):
        yield


@pytest.fixture(scope="module")
def arguments(model_settings: dict[str, Any]) -> dict[str, Any]:
    """All neighbours within the cutoff: which of two equally far ones to drop is no question of symmetry."""
    return model_settings | {"max_neighbors": 500, "max_radius": 4.0, "num_layers": 2}


@default_precision(torch.float64)
def make_model(arguments: dict[str, Any], **changes: Any) -> EquiformerV2DeNS:
    """A model in evaluation mode whose biases and norms are not the zeros and ones that they start as."""
    torch.manual_seed(0)
    model = EquiformerV2DeNS(**arguments | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model(arguments: dict[str, Any]) -> EquiformerV2DeNS:
    """With gates instead of grids, which makes all of it equivariant up to rounding."""
    return make_model(arguments, use_gate_act=True, use_grid_mlp=False)


@pytest.fixture(scope="module")
def conditioned(structure: Callable[..., Data]) -> Callable[..., Data]:
    """Makes a structure as the corruption leaves it: every other atom conditioned on its force."""

    def make(seed: int, **keywords: Any) -> Data:
        data = structure(seed, dtype=torch.float64, **keywords)
        data.noise_mask = torch.arange(data.num_nodes) % 2 == 0
        data.condition_forces = data.forces * data.noise_mask[:, None]
        data.noise_vec = torch.zeros_like(data.forces)
        data.sigmas = torch.full((data.num_nodes, 1), 0.1)
        data.corrupted = torch.tensor([True])
        return data

    return make


@pytest.fixture
def batch(conditioned: Callable[..., Data]) -> Batch:
    return Batch.from_data_list([conditioned(0), conditioned(1, natoms=9)])


def predict(model: EquiformerV2DeNS, data: Data) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(data)


def rotated(data: Data, matrix: Tensor) -> Data:
    data = data.clone()
    for name in VECTORS:
        data[name] = data[name] @ matrix.T
    return data


def rotation_errors(model: EquiformerV2DeNS, data: Data, matrix: Tensor) -> dict[str, float]:
    """Largest difference between rotating input and rotating output, relative to the largest output."""
    before, after = predict(model, data), predict(model, rotated(data, matrix))
    expected = {name: before[name] @ matrix.T if name != "energy" else before[name] for name in OUTPUTS}
    return {
        name: float((after[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in OUTPUTS
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = ROUNDING) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)


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
        assert_same(predict(model, batch), expected)

    def test_rotating_the_positions_alone_is_not_enough(self, model, batch):
        """The conditioning forces are seen: left behind, they change the answer."""
        matrix = o3.rand_matrix()
        wrong = rotated(batch, matrix)
        wrong.condition_forces = batch.condition_forces
        before, after = predict(model, batch), predict(model, wrong)
        assert (after["energy"] - before["energy"]).abs().max() > 1e-6
        assert (after["noise"] - before["noise"] @ matrix.T).abs().max() > 1e-3

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


class TestTranslationAndImages:
    @given(st.tuples(*[st.floats(-20, 20)] * 3))
    @few_examples
    def test_translation(self, model, batch, shift):
        moved = batch.clone()
        moved.pos = batch.pos + torch.tensor(shift)
        assert_same(predict(model, moved), predict(model, batch))

    @given(seeds, st.integers(1, 3))
    @few_examples
    def test_atoms_may_be_any_of_their_periodic_images(self, model, batch, seed, furthest):
        """Trajectories and corrupted structures are not wrapped into the cell."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(-furthest, furthest + 1, batch.pos.shape, generator=generator).to(batch.pos)
        moved = batch.clone()
        moved.pos = batch.pos + torch.einsum("ni,nij->nj", images, batch.cell[batch.batch])
        assert_same(predict(model, moved), predict(model, batch))

    def test_atoms_are_not_wrapped_where_the_structure_is_not_periodic(self, model, conditioned):
        data = conditioned(0)
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
        assert_same(predict(model, sheared), predict(model, batch))

    def test_positions_cell_and_mode_do_matter(self, model, batch):
        """What the tests above would not notice if the model ignored its input."""
        expected = predict(model, batch)
        for name in ("pos", "cell"):
            changed = batch.clone()
            changed[name] = 1.05 * changed[name]
            assert (predict(model, changed)["energy"] - expected["energy"]).abs().min() > 1e-6, name


class TestPermutation:
    @given(seeds)
    @few_examples
    def test_outputs_permute_with_the_atoms(self, model, conditioned, seed):
        data = conditioned(0)
        order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))
        shuffled = data.clone()
        for name in (
            "pos",
            "atomic_numbers",
            "fixed",
            "tags",
            "forces",
            "noise_mask",
            "condition_forces",
            "sigmas",
        ):
            shuffled[name] = data[name][order]
        expected = predict(model, Batch.from_data_list([data]))
        expected = {name: value if name == "energy" else value[order] for name, value in expected.items()}
        assert_same(predict(model, Batch.from_data_list([shuffled])), expected)

    def test_structures_of_a_batch_permute(self, model, conditioned):
        sizes = {0: 12, 1: 9, 2: 5}
        forwards = [conditioned(seed, natoms=natoms) for seed, natoms in sizes.items()]
        found = predict(model, Batch.from_data_list(forwards[::-1]))
        expected = predict(model, Batch.from_data_list(forwards))
        expected = {
            name: torch.cat(list(value.split(1 if name == "energy" else list(sizes.values())))[::-1])
            for name, value in expected.items()
        }
        assert_same(found, expected)


class TestBatching:
    @pytest.mark.parametrize("pbc", [(True, True, True), (False, True, True), (True, True, False)])
    @pytest.mark.parametrize("shape", [(1, 3), (3,)])
    def test_batch_equals_singles(self, model, conditioned, pbc, shape):
        """Also with ``pbc`` of shape (3,), which a batch holds as (3B,)."""
        structures = [conditioned(seed, natoms=natoms) for seed, natoms in ((0, 12), (1, 1), (2, 7), (3, 20))]
        for data in structures:
            data.pbc = torch.tensor(pbc).reshape(shape)
        together = predict(model, Batch.from_data_list(structures))
        alone = [predict(model, Batch.from_data_list([data])) for data in structures]
        assert_same(together, {name: torch.cat([one[name] for one in alone]) for name in OUTPUTS})

    def test_structures_of_different_periodicity(self, model, conditioned):
        structures = [conditioned(seed) for seed in range(4)]
        for data, pbc in zip(structures, ((1, 1, 1), (0, 0, 0), (1, 1, 0), (1, 1, 1)), strict=True):
            data.pbc = torch.tensor([pbc], dtype=torch.bool)
        together = predict(model, Batch.from_data_list(structures))
        alone = [predict(model, Batch.from_data_list([data])) for data in structures]
        assert_same(together, {name: torch.cat([one[name] for one in alone]) for name in OUTPUTS})

    def test_identical_structures_have_identical_outputs(self, model, conditioned):
        outputs = predict(model, Batch.from_data_list([conditioned(0)] * 3))
        for name, value in outputs.items():
            first, *others = value.chunk(3)
            for other in others:
                torch.testing.assert_close(other, first, rtol=0, atol=1e-13, msg=name)

    def test_conditioned_and_ordinary_structures_share_a_batch(self, model, conditioned):
        """A zero force is as good as none, and a conditioned structure does not disturb an ordinary one."""
        ordinary = conditioned(0)
        ordinary.condition_forces = torch.zeros_like(ordinary.forces)
        mixed = predict(model, Batch.from_data_list([ordinary, conditioned(1)]))
        plain = Batch.from_data_list([ordinary])
        del plain.condition_forces
        expected = predict(model, plain)
        torch.testing.assert_close(mixed["energy"][:1], expected["energy"], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(mixed["forces"][:12], expected["forces"], rtol=0, atol=ROUNDING)

    def test_a_structure_that_is_no_batch(self, model, conditioned):
        data = conditioned(0)
        assert_same(predict(model, data), predict(model, Batch.from_data_list([data])))


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
    def structures(self, conditioned) -> list[Data]:
        return [conditioned(0), conditioned(1, natoms=7)]

    def test_without_any_cell_as_in_a_huge_box(self, molecular, periodic, structures):
        boxed = [data.clone() for data in structures]
        for data in boxed:
            data.cell = 1000 * torch.eye(3)[None]
        for data in structures:
            del data.cell, data.pbc
        assert_same(
            predict(molecular, Batch.from_data_list(structures)),
            predict(periodic, Batch.from_data_list(boxed)),
        )

    def test_a_cell_is_not_looked_at(self, molecular, structures):
        with_cell = predict(molecular, Batch.from_data_list(structures))
        for data in structures:
            del data.cell, data.pbc
        assert_same(predict(molecular, Batch.from_data_list(structures)), with_cell)

    def test_not_periodic_as_in_a_huge_box(self, periodic, structures):
        boxed = [data.clone() for data in structures]
        for data, box in zip(structures, boxed, strict=True):
            data.pbc = torch.tensor([[False, False, False]])
            box.cell = 1000 * torch.eye(3)[None]
        assert_same(
            predict(periodic, Batch.from_data_list(structures)),
            predict(periodic, Batch.from_data_list(boxed)),
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
        assert_same(predict(stored, batch), predict(model, batch))
        batch.edge_index, batch.cell_offsets = batch.edge_index[:, :5], batch.cell_offsets[:5]
        assert (predict(stored, batch)["energy"] - predict(model, batch)["energy"]).abs().max() > 1e-6

    def test_of_corrupted_structures_are_refused(self, stored, batch):
        batch.edge_index = torch.zeros(2, 1, dtype=torch.long)
        with pytest.raises(ValueError, match="otf_graph: True"):
            predict(stored, batch)


class TestWithoutNeighbours:
    """Legal: a desorbed atom, or a lone atom in a large cell."""

    @staticmethod
    def lone_atom(conditioned: Callable[..., Data]) -> Data:
        data = conditioned(5, natoms=1)
        data.cell = 50 * torch.eye(3)[None]
        return data

    @pytest.mark.parametrize("use_pbc", [True, False])
    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize("is_conditioned", [True, False])
    def test_finite_outputs_and_gradients(self, arguments, conditioned, use_pbc, others, is_conditioned):
        model = make_model(arguments, use_pbc=use_pbc).train()
        lone = self.lone_atom(conditioned)
        batch = Batch.from_data_list([lone, *[conditioned(seed) for seed in range(others)], lone])
        if not is_conditioned:
            del batch.condition_forces
        outputs = model(batch)
        assert set(outputs) == set(OUTPUTS)
        sum(value.square().sum() for value in outputs.values()).backward()
        assert all(torch.isfinite(value).all() for value in outputs.values())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_an_atom_far_above_the_slab_does_not_disturb_it(self, model, conditioned):
        slab = conditioned(0, natoms=9)
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


class TestLeavesAlone:
    @pytest.mark.parametrize("training", [False, True])
    def test_input(self, model, conditioned, training):
        structures = [conditioned(0), conditioned(1, natoms=7)]
        for data in structures:
            data.pbc = torch.tensor([True, True, True])
            data.atomic_numbers = data.atomic_numbers.to(torch.uint8)
        batch = Batch.from_data_list(structures)
        before = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in batch.to_dict().items()
        }
        model.train(training)
        try:
            model(batch)
        finally:
            model.eval()
        after = batch.to_dict()
        assert list(after) == list(before)
        for name, value in before.items():
            if torch.is_tensor(value):
                assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
            else:
                assert value == after[name], name

    def test_random_numbers_in_evaluation(self, arguments, batch):
        model = make_model(arguments)
        state = torch.get_rng_state()
        first, second = predict(model, batch), predict(model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        for name in OUTPUTS:
            assert torch.equal(first[name], second[name])

    def test_training_is_reproducible_from_the_seed(self, arguments, batch):
        model = make_model(arguments).train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(predict(model, batch)["forces"])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_atomic_numbers_of_any_type(model, batch, dtype):
    converted = batch.clone()
    converted.atomic_numbers = converted.atomic_numbers.to(dtype)
    for name, value in predict(model, batch).items():
        assert torch.equal(predict(model, converted)[name], value)
