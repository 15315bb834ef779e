"""Symmetries of Equiformer, forces as the exact gradient of its energy, and what it must leave alone.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerDeNS

ROUNDING = 1e-10
"""Energies are some 1, forces and noise some 1 to 10; two layers with sums over ten neighbours stay below."""
STEP = 1e-4
"""Å (or units of a weight). Central differences are then wrong by some 1e-8, rounding adds 1e-12 / 1e-4."""

ARGUMENTS = {
    "irreps_node_embedding": "8x0e+4x1e+2x2e",
    "irreps_pre_attn": "8x0e+4x1e+2x2e",
    "irreps_feature": "12x0e+6x1e+4x2e",
    "irreps_head": "4x0e+2x1e+2x2e",
    "irreps_mlp_mid": "8x0e+4x1e+4x2e",
    "num_heads": 2,
    "num_layers": 2,
    "number_of_basis": 8,
    "fc_neurons": [8],
}
L3 = {
    "irreps_equivariant_inputs": "1x0e+1x1e+1x2e+1x3e",
    "irreps_node_embedding": "8x0e+4x1e+2x2e+2x3e",
    "irreps_sh": "1x0e+1x1e+1x2e+1x3e",
    "irreps_pre_attn": "8x0e+4x1e+2x2e+2x3e",
    "irreps_head": "4x0e+2x1e+2x2e+1x3e",
}
MIRRORED = {
    "irreps_equivariant_inputs": "1x0e+1x1o+1x2e",
    "irreps_node_embedding": "8x0e+2x0o+2x1e+4x1o+2x2e",
    "irreps_sh": "1x0e+1x1o+1x2e",
    "irreps_pre_attn": "8x0e+2x0o+2x1e+4x1o+2x2e",
    "irreps_feature": "12x0e+2x0o+3x1e+6x1o+4x2e",
    "irreps_head": "4x0e+1x0o+1x1e+2x1o+2x2e",
    "irreps_mlp_mid": "8x0e+2x0o+2x1e+4x1o+4x2e",
}
"""With parities, for O(3) instead of SO(3)."""
VECTORS = ("pos", "condition_forces")
OUTPUTS = ("energy", "forces", "noise")

few_examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(**changes: Any) -> EquiformerDeNS:
    """In evaluation mode, with biases and norms that are not the zeros and ones that they start as."""
    torch.manual_seed(0)
    model = EquiformerDeNS(**ARGUMENTS | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model() -> EquiformerDeNS:
    return make_model(max_radius=3.0)


def conditioned(seed: int, natoms: int = 9) -> Data:
    """A molecule as the corruption leaves it: every other atom conditioned on its force."""
    rng = np.random.default_rng(seed)
    pos = np.zeros((1, 3))
    while len(pos) < natoms:
        place = rng.normal(scale=1.5, size=3)
        if np.linalg.norm(pos - place, axis=1).min() > 1.0:
            pos = np.vstack([pos, place])
    mask = torch.arange(natoms) % 2 == 0
    return Data(
        pos=torch.tensor(pos),
        atomic_numbers=torch.tensor(rng.choice([1, 6, 8], size=natoms)),
        natoms=natoms,
        noise_mask=mask,
        condition_forces=torch.tensor(rng.normal(size=(natoms, 3))) * mask[:, None],
        corrupted=torch.tensor([True]),
    )


@pytest.fixture
def batch() -> Batch:
    return Batch.from_data_list([conditioned(0), conditioned(1, natoms=6)])


def predict(model: EquiformerDeNS, data: Data) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(data)


def transformed(data: Data, matrix: Tensor) -> Data:
    data = data.clone()
    for name in VECTORS:
        data[name] = data[name] @ matrix.T
    return data


def errors(model: EquiformerDeNS, data: Data, matrix: Tensor) -> dict[str, float]:
    """Largest difference between transforming input and transforming output."""
    before, after = predict(model, data), predict(model, transformed(data, matrix))
    expected = {name: before[name] @ matrix.T if name != "energy" else before[name] for name in OUTPUTS}
    return {name: float((after[name] - expected[name]).abs().max()) for name in OUTPUTS}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = ROUNDING) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)


class TestRotation:
    @given(seeds)
    @few_examples
    def test_degree_2(self, model, batch, seed):
        torch.manual_seed(seed)
        assert max(errors(model, batch, o3.rand_matrix()).values()) < ROUNDING

    @pytest.mark.parametrize("changes", [L3, MIRRORED, {"irreps_sh": "1x0e+1x1e"}], ids=["L3", "odd", "L1"])
    def test_other_irreps(self, batch, changes):
        assert max(errors(make_model(**changes), batch, o3.rand_matrix()).values()) < ROUNDING

    def test_a_model_made_double_afterwards(self, batch):
        torch.set_default_dtype(torch.float32)
        try:
            model = make_model().double()
        finally:
            torch.set_default_dtype(torch.float64)
        assert max(errors(model, batch, o3.rand_matrix()).values()) < ROUNDING

    def test_rotating_the_positions_alone_is_not_enough(self, model, batch):
        """The conditioning forces are seen: left behind, they change the answer."""
        matrix = o3.rand_matrix()
        wrong = transformed(batch, matrix)
        wrong.condition_forces = batch.condition_forces
        before, after = predict(model, batch), predict(model, wrong)
        assert (after["energy"] - before["energy"]).abs().max() > 1e-3
        assert (after["noise"] - before["noise"] @ matrix.T).abs().max() > 1e-3

    def test_mirror_images_are_told_apart_by_even_irreps_alone(self, model, batch):
        """What the paper has: its vectors are pseudovectors, so products mix what a mirror tells apart."""
        assert errors(model, batch, -torch.eye(3))["forces"] > 1e-3
        assert max(errors(make_model(**MIRRORED), batch, -torch.eye(3)).values()) < ROUNDING


class TestOtherSymmetries:
    @given(st.tuples(*[st.floats(-20, 20)] * 3))
    @few_examples
    def test_translation(self, model, batch, shift):
        moved = batch.clone()
        moved.pos = batch.pos + torch.tensor(shift)
        assert_same(predict(model, moved), predict(model, batch))

    @given(seeds)
    @few_examples
    def test_outputs_permute_with_the_atoms(self, model, seed):
        data = conditioned(0)
        order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))
        shuffled = data.clone()
        for name in ("pos", "atomic_numbers", "noise_mask", "condition_forces"):
            shuffled[name] = data[name][order]
        expected = predict(model, data)
        expected = {name: value if name == "energy" else value[order] for name, value in expected.items()}
        assert_same(predict(model, shuffled), expected)

    def test_forces_add_up_to_nothing(self, model, batch):
        """Nor do they turn a molecule, unless it is conditioned on forces that stay behind."""

        def total(values: Tensor) -> float:
            return float(torch.zeros(2, 3).index_add(0, batch.batch, values).abs().max())

        forces = predict(model, batch)["forces"]
        assert forces.abs().max() > 1e-2
        assert total(forces) < ROUNDING
        assert total(torch.linalg.cross(batch.pos, forces)) > 1e-3
        del batch.condition_forces
        assert total(torch.linalg.cross(batch.pos, predict(model, batch)["forces"])) < ROUNDING


class TestBatching:
    def test_batch_equals_singles(self, model):
        structures = [conditioned(seed, natoms) for seed, natoms in ((0, 9), (1, 1), (2, 5), (3, 14))]
        together = predict(model, Batch.from_data_list(structures))
        alone = [predict(model, data) for data in structures]
        assert_same(together, {name: torch.cat([one[name] for one in alone]) for name in OUTPUTS})

    def test_zero_conditioning_is_none(self, model):
        """And a conditioned molecule does not disturb an ordinary one."""
        ordinary = conditioned(0)
        ordinary.condition_forces = torch.zeros(9, 3)
        mixed = predict(model, Batch.from_data_list([ordinary, conditioned(1)]))
        del ordinary.condition_forces
        expected = predict(model, ordinary)
        torch.testing.assert_close(mixed["energy"][:1], expected["energy"], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(mixed["forces"][:9], expected["forces"], rtol=0, atol=ROUNDING)

    def test_conditioning_matters(self, model, batch):
        expected = predict(model, batch)
        del batch.condition_forces
        found = predict(model, batch)
        assert (found["energy"] - expected["energy"]).abs().min() > 1e-3
        assert (found["forces"] - expected["forces"]).abs().max() > 1e-3

    def test_an_atom_out_of_reach_does_not_disturb_the_others(self, model):
        data = conditioned(0)
        both = data.clone()
        for name in ("atomic_numbers", "noise_mask", "condition_forces"):
            both[name] = torch.cat([data[name], data[name][-1:]])
        both.pos = torch.cat([data.pos, torch.full((1, 3), 30.0)])
        both.natoms = 10
        with_atom, without = predict(model, both), predict(model, data)
        for name in ("forces", "noise"):
            torch.testing.assert_close(with_atom[name][:9], without[name], rtol=0, atol=ROUNDING)
        assert (with_atom["forces"][9] == 0).all()


def along(function: Callable[[float], float]) -> float:
    """Derivative at zero by central differences of fourth order."""
    near, far = function(STEP) - function(-STEP), function(2 * STEP) - function(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


class TestGradients:
    @pytest.mark.parametrize("changes", [{}, L3], ids=["L2", "L3"])
    @pytest.mark.parametrize("is_conditioned", [False, True])
    def test_forces_are_minus_the_gradient_of_the_energy(self, batch, changes, is_conditioned):
        """Also those of corrupted structures, at the corrupted positions."""
        model = make_model(**changes)
        if not is_conditioned:
            del batch.condition_forces
        forces = predict(model, batch)["forces"]
        start = batch.pos.clone()
        for _ in range(4):
            direction = torch.randn_like(start)

            def energy(step: float, direction: Tensor = direction) -> float:
                batch.pos = start + step * direction
                return float(predict(model, batch)["energy"].sum())

            assert abs(along(energy) + float((forces * direction).sum())) < 1e-8

    def test_every_component_of_the_forces(self, model):
        data = conditioned(4, natoms=4)
        forces, start = predict(model, data)["forces"], data.pos.clone()
        for atom in range(4):
            for axis in range(3):

                def energy(step: float, place: tuple[int, int] = (atom, axis)) -> float:
                    data.pos = start.clone()
                    data.pos[place] += step
                    return float(predict(model, data)["energy"])

                assert abs(along(energy) + float(forces[atom, axis])) < 1e-8

    @pytest.mark.parametrize("is_conditioned", [False, True])
    def test_losses_on_forces_are_differentiated_exactly(self, batch, is_conditioned):
        """The second derivative, for random directions in the space of all weights."""
        model = make_model(max_radius=3.0).train()
        if not is_conditioned:
            del batch.condition_forces
        target = {name: torch.randn_like(value) for name, value in predict(model, batch).items()}
        start = [parameter.detach().clone() for parameter in model.parameters()]

        def loss() -> Tensor:
            outputs = model(batch)
            return sum(((outputs[name] - target[name]) ** 2).sum() for name in OUTPUTS)

        gradients = torch.autograd.grad(loss(), list(model.parameters()))
        for _ in range(3):
            directions = [torch.randn_like(one) for one in start]
            size = torch.sqrt(sum((one**2).sum() for one in directions))

            def moved(step: float, directions: list[Tensor] = directions, size: Tensor = size) -> float:
                with torch.no_grad():
                    for one, begin, direction in zip(model.parameters(), start, directions, strict=True):
                        one.copy_(begin + step * direction / size)
                return float(loss().detach())

            exact = sum((one * other).sum() for one, other in zip(gradients, directions, strict=True)) / size
            numerical = along(moved)
            moved(0.0)
            assert abs(numerical - float(exact)) < 1e-7 * max(1.0, abs(numerical))
            assert abs(float(exact)) > 1e-3

    def test_finite_where_forces_are_zero(self, batch):
        model = make_model().train()
        batch.condition_forces = torch.zeros_like(batch.pos)
        outputs = model(batch)
        sum(value.square().sum() for value in outputs.values()).backward()
        assert all(torch.isfinite(value).all() for value in outputs.values())
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    @pytest.mark.parametrize("others", [0, 1])
    def test_finite_without_neighbours(self, others):
        model = make_model().train()
        lone = conditioned(5, natoms=1)
        batch = Batch.from_data_list([lone, *[conditioned(seed) for seed in range(others)], lone])
        outputs = model(batch)
        sum(value.square().sum() for value in outputs.values()).backward()
        assert all(torch.isfinite(value).all() for value in outputs.values())
        assert (outputs["forces"][0] == 0).all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_molecular_dynamics_drifts_no_more_than_its_integrator():
    """The error in energy of velocity Verlet falls by four when the step is halved, if forces conserve it."""
    model = make_model(max_radius=50.0)
    data = conditioned(0)
    del data.condition_forces
    torch.manual_seed(1)
    velocities, start = 0.05 * torch.randn(9, 3), data.pos.clone()

    def worst_error(steps: int) -> float:
        step = 2.0 / steps
        data.pos, velocity = start.clone(), velocities.clone()
        outputs = predict(model, data)
        energies = []
        for _ in range(steps):
            velocity = velocity + step / 2 * outputs["forces"]
            data.pos = data.pos + step * velocity
            outputs = predict(model, data)
            velocity = velocity + step / 2 * outputs["forces"]
            energies.append(float(outputs["energy"]) + 0.5 * float(velocity.square().sum()))
        begin = float(predict(model, Data(**{**data.to_dict(), "pos": start}))["energy"])
        return max(abs(energy - begin - 0.5 * float(velocities.square().sum())) for energy in energies)

    coarse, fine = worst_error(40), worst_error(80)
    assert 3.5 < coarse / fine < 4.5, (coarse, fine)


class TestLeavesAlone:
    @pytest.mark.parametrize("training", [False, True])
    def test_input(self, training):
        model = make_model().train(training)
        structures = [conditioned(0), conditioned(1, natoms=7)]
        for data in structures:
            data.atomic_numbers = data.atomic_numbers.to(torch.uint8)
        batch = Batch.from_data_list(structures)
        before = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in batch.to_dict().items()
        }
        sum(value.sum() for value in model(batch).values()).backward()
        after = batch.to_dict()
        assert list(after) == list(before)
        for name, value in before.items():
            if torch.is_tensor(value):
                assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
            else:
                assert value == after[name], name
        assert not batch.pos.requires_grad and batch.pos.grad is None

    def test_random_numbers_in_evaluation(self, model, batch):
        state = torch.get_rng_state()
        first, second = predict(model, batch), predict(model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        for name in OUTPUTS:
            assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_atomic_numbers_of_any_type(model, batch, dtype):
    converted = batch.clone()
    converted.atomic_numbers = converted.atomic_numbers.to(dtype)
    for name, value in predict(model, batch).items():
        assert torch.equal(predict(model, converted)[name], value)
