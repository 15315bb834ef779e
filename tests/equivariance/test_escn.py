"""Symmetries of eSCN + DeNS, with conditioning and noise head, and what it must leave alone.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding. What the
graph alone decides is tested with EquiformerV2, which builds it by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from e3nn import o3
from fairchem.core.models.escn.escn import EnergyBlock, ForceBlock, LayerBlock, MessageBlock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from fairchem_dens.models import ESCNDeNS, graph

ROUNDING = 1e-11
"""Relative to the largest output; heads sum dozens of points that cancel, which costs three of 16 digits."""

VECTORS = ("pos", "cell", "condition_forces")
OF_ATOMS = ("pos", "atomic_numbers", "fixed", "tags", "forces", "noise_mask", "condition_forces")
OUTPUTS = ("energy", "forces", "noise")

few_examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


ARGUMENTS: dict[str, Any] = {
    # All neighbours within the cutoff: which of two equally far ones to drop is no question of symmetry.
    "max_neighbors": 500,
    "cutoff": 4.0,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [2],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 32,
    "distance_resolution": 0.2,
}


@default_precision(torch.float64)
def make_model(**changes: Any) -> ESCNDeNS:
    """A model in evaluation mode whose signals neither vanish nor explode, unlike those it starts with."""
    torch.manual_seed(0)
    model = ESCNDeNS(**ARGUMENTS | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


@default_precision(torch.float64)
def with_exact_heads(model: ESCNDeNS) -> ESCNDeNS:
    """Replace what makes the heads inexact.

    Without an activation they read polynomials of a degree up to lmax + 1, over which the mean of the corners
    of an icosahedron is the mean of the sphere if the degree is at most 5.
    """
    golden_ratio = (1 + 5**0.5) / 2
    corners = torch.cartesian_prod(torch.tensor([0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    corners = corners * torch.tensor([1.0, 1.0, golden_ratio])
    points = torch.cat([corners.roll(axis, dims=1) for axis in range(3)])
    points = points / points.norm(dim=1, keepdim=True)
    harmonics = o3.spherical_harmonics(list(range(model.lmax_list[0] + 1)), points, normalize=False)
    with torch.no_grad():
        model.sphere_points.copy_(points)
        model.sphharm_weights[0].copy_(harmonics)
    return without_activation(model, (EnergyBlock, ForceBlock))


def without_activation(model: ESCNDeNS, blocks: tuple[type[nn.Module], ...]) -> ESCNDeNS:
    for module in model.modules():
        if isinstance(module, blocks):
            module.act = nn.Identity()
    return model


@pytest.fixture(scope="module")
def model() -> ESCNDeNS:
    return make_model()


@pytest.fixture(scope="module")
def conditioned(structure: Callable[..., Data]) -> Callable[..., Data]:
    """Makes a structure as the corruption leaves it: every other atom conditioned on its force."""

    def make(seed: int, **keywords: Any) -> Data:
        data = structure(seed, dtype=torch.float64, **keywords)
        data.noise_mask = torch.arange(data.num_nodes) % 2 == 0
        data.condition_forces = data.forces * data.noise_mask[:, None]
        return data

    return make


@pytest.fixture
def batch(conditioned: Callable[..., Data]) -> Batch:
    return Batch.from_data_list([conditioned(0), conditioned(1, natoms=9)])


def predict(model: ESCNDeNS, data: Data) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(data)


def rotated(data: Data, matrix: Tensor) -> Data:
    data = data.clone()
    for name in VECTORS:
        data[name] = data[name] @ matrix.T
    return data


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert set(found) == set(expected) == set(OUTPUTS)
    return {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in OUTPUTS
    }


def rotation_errors(model: ESCNDeNS, data: Data, matrix: Tensor) -> dict[str, float]:
    before, after = predict(model, data), predict(model, rotated(data, matrix))
    return relative_errors(
        after, {name: before[name] @ matrix.T if name != "energy" else before[name] for name in OUTPUTS}
    )


def worst_error(model: ESCNDeNS, data: Data) -> float:
    """Of three rotations."""
    torch.manual_seed(5)
    return max(max(rotation_errors(model, data, o3.rand_matrix()).values()) for _ in range(3))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    errors = relative_errors(found, expected)
    assert max(errors.values()) < ROUNDING, errors


orders = pytest.mark.parametrize(
    "orders",
    [
        {"lmax_list": [2], "mmax_list": [2]},
        {"lmax_list": [2], "mmax_list": [1]},
        {"lmax_list": [3], "mmax_list": [2]},
    ],
    ids=str,
)


class TestRotation:
    @orders
    def test_exact_without_what_samples_the_sphere(self, batch, orders):
        """Conditioning, frames of edges, convolutions and tables of the grids have no error of their own."""
        model = with_exact_heads(make_model(num_sphere_samples=12, **orders))
        without_activation(model, (LayerBlock, MessageBlock))
        assert worst_error(model, batch) < ROUNDING

    @orders
    def test_error_of_the_blocks_shrinks_with_grid_resolution(self, batch, orders):
        """SiLU makes harmonics above lmax, which a grid of R points mistakes for lower ones.

        It is analytic, so their size falls geometrically with R: by fifty and more from each to the next.
        """
        tolerance = {8: 0.3, 14: 5e-3, 20: 1e-4}
        worst = {
            resolution: worst_error(
                with_exact_heads(make_model(num_sphere_samples=12, resolution=resolution, **orders)), batch
            )
            for resolution in tolerance
        }
        assert all(worst[resolution] < tolerance[resolution] for resolution in tolerance), worst
        assert worst[20] < worst[14] / 30 and worst[14] < worst[8] / 30, worst

    def test_error_of_the_heads_shrinks_with_the_points_on_the_sphere(self, batch):
        """fairchem spreads them evenly by a spiral; means over it converge a little faster than 1/points."""
        tolerance = {32: 0.3, 256: 1e-2, 2048: 1e-3}
        worst = {
            samples: worst_error(make_model(num_sphere_samples=samples, resolution=20), batch)
            for samples in tolerance
        }
        assert all(worst[samples] < tolerance[samples] for samples in tolerance), worst
        assert worst[2048] < worst[256] / 8 and worst[256] < worst[32] / 8, worst

    def test_roll_about_the_edge_does_not_matter(self, batch, monkeypatch):
        """But for the grids. Why it may be random in training and fixed in evaluation."""
        model = without_activation(make_model(), (MessageBlock,))
        expected = predict(model, batch)
        frames = graph.edge_frames
        monkeypatch.setattr(
            "fairchem_dens.models.escn.edge_frames",
            lambda vectors, random_roll: frames(vectors, random_roll=True),
        )
        assert_same(predict(model, batch), expected)

    def test_rotating_the_positions_alone_is_not_enough(self, model, batch):
        """The conditioning forces are seen: left behind, they change the answer."""
        matrix = o3.rand_matrix()
        wrong = rotated(batch, matrix)
        wrong.condition_forces = batch.condition_forces
        errors = relative_errors(predict(model, wrong), predict(model, rotated(batch, matrix)))
        assert min(errors.values()) > 1e-2, errors


class TestTranslationAndImages:
    @given(st.tuples(*[st.floats(-20, 20)] * 3))
    @few_examples
    def test_translation(self, model, batch, shift):
        moved = batch.clone()
        moved.pos = batch.pos + torch.tensor(shift)
        assert_same(predict(model, moved), predict(model, batch))

    @given(seeds)
    @few_examples
    def test_atoms_may_be_any_of_their_periodic_images(self, model, batch, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(-2, 3, batch.pos.shape, generator=generator).to(batch.pos)
        moved = batch.clone()
        moved.pos = batch.pos + torch.einsum("ni,nij->nj", images, batch.cell[batch.batch])
        assert_same(predict(model, moved), predict(model, batch))

    def test_positions_and_cell_do_matter(self, model, batch):
        """What the tests above would not notice if the model ignored its input."""
        for name in ("pos", "cell"):
            changed = batch.clone()
            changed[name] = 1.05 * changed[name]
            assert min(relative_errors(predict(model, changed), predict(model, batch)).values()) > 1e-3, name


class TestPermutationAndBatching:
    @given(seeds)
    @few_examples
    def test_outputs_permute_with_the_atoms(self, model, conditioned, seed):
        data = conditioned(0)
        order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))
        shuffled = data.clone()
        for name in OF_ATOMS:
            shuffled[name] = data[name][order]
        expected = predict(model, Batch.from_data_list([data]))
        expected = {name: value if name == "energy" else value[order] for name, value in expected.items()}
        assert_same(predict(model, Batch.from_data_list([shuffled])), expected)

    @pytest.mark.parametrize("shape", [(1, 3), (3,)])
    def test_batch_equals_singles(self, model, conditioned, shape):
        """Also of different periodicity, and with ``pbc`` of shape (3,), which a batch holds as (3B,)."""
        sizes = ((0, 12), (1, 1), (2, 7), (3, 14))
        structures = [conditioned(seed, natoms=natoms) for seed, natoms in sizes]
        for data, pbc in zip(structures, ((1, 1, 1), (0, 0, 0), (1, 1, 0), (1, 1, 1)), strict=True):
            data.pbc = torch.tensor(pbc, dtype=torch.bool).reshape(shape)
        together = predict(model, Batch.from_data_list(structures))
        alone = [predict(model, Batch.from_data_list([data])) for data in structures]
        assert_same(together, {name: torch.cat([one[name] for one in alone]) for name in OUTPUTS})

    def test_a_structure_that_is_no_batch(self, model, conditioned):
        data = conditioned(0)
        assert_same(predict(model, data), predict(model, Batch.from_data_list([data])))


class TestConditioning:
    def test_changes_the_structures_that_have_it_and_no_other(self, model, conditioned):
        """A zero force is as good as none, and finite."""
        ordinary = conditioned(0)
        ordinary.condition_forces = torch.zeros_like(ordinary.forces)
        mixed = predict(model, Batch.from_data_list([ordinary, conditioned(1)]))
        plain = Batch.from_data_list([ordinary, conditioned(1)])
        del plain.condition_forces
        without = predict(model, plain)
        assert set(without) == {"energy", "forces"}
        for name, count in (("energy", 1), ("forces", 12)):
            scale = without[name].abs().max()
            assert (mixed[name][:count] - without[name][:count]).abs().max() < ROUNDING * scale
            assert (mixed[name][count:] - without[name][count:]).abs().max() > 1e-2 * scale

    def test_gradients_are_finite_where_forces_are_zero(self, batch):
        model = make_model().train()
        batch.condition_forces[::2] = 0
        batch.condition_forces.requires_grad_()
        sum(value.square().sum() for value in model(batch).values()).backward()
        assert torch.isfinite(batch.condition_forces.grad).all()
        assert all(
            torch.isfinite(parameter.grad).all()
            for parameter in model.parameters()
            if parameter.requires_grad
        )


class TestMoleculesAndLoneAtoms:
    def test_without_any_cell_as_in_a_huge_box(self, conditioned):
        structures = [conditioned(0), conditioned(1, natoms=7)]
        boxed = [data.clone() for data in structures]
        for data in boxed:
            data.cell = 1000 * torch.eye(3)[None]
        for data in structures:
            del data.cell, data.pbc
        assert_same(
            predict(make_model(use_pbc=False), Batch.from_data_list(structures)),
            predict(make_model(), Batch.from_data_list(boxed)),
        )

    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize("is_conditioned", [True, False])
    def test_without_neighbours_outputs_and_gradients_are_finite(self, conditioned, others, is_conditioned):
        """Legal: a desorbed atom. Distributed training waits for the gradient of each parameter."""
        lone = conditioned(5, natoms=1)
        lone.cell = 50 * torch.eye(3)[None]
        model = make_model().train()
        batch = Batch.from_data_list([lone, *[conditioned(seed) for seed in range(others)], lone])
        if not is_conditioned:
            del batch.condition_forces
        outputs = model(batch)
        assert {name: len(value) for name, value in outputs.items()} == {
            "energy": 2 + others,
            "forces": 2 + 12 * others,
            "noise": 2 + 12 * others,
        }
        sum(value.square().sum() for value in outputs.values()).backward()
        assert all(torch.isfinite(value).all() for value in outputs.values())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_a_single_edge_is_as_good_as_many(self, conditioned):
        """fairchem's blocks overwrite what the gradient needs when there is exactly one."""
        model = make_model(use_pbc=False, otf_graph=False)
        pair = conditioned(0, natoms=2)
        del pair.noise_mask
        pair.edge_index = torch.tensor([[0], [1]])
        gradients = []
        for copies in (1, 2):
            outputs = model(Batch.from_data_list([pair] * copies))
            model.zero_grad()
            sum(value.square().sum() for value in outputs.values()).backward()
            gradients.append({n: p.grad / copies for n, p in model.named_parameters() if p.requires_grad})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-15, msg=name)


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

    def test_random_numbers_in_evaluation(self, model, batch):
        state = torch.get_rng_state()
        first, second = predict(model, batch), predict(model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)

    def test_training_rolls_the_frames_reproducibly_from_the_seed(self, batch):
        model = make_model().train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(predict(model, batch)["forces"])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_atomic_numbers_of_any_type(model, batch, dtype):
    converted = batch.clone()
    converted.atomic_numbers = converted.atomic_numbers.to(dtype)
    for name, value in predict(model, batch).items():
        assert torch.equal(predict(model, converted)[name], value)
