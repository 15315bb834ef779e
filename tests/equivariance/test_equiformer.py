"""Symmetries of Equiformer with the irreps it may have, and forces as the exact gradient of its energy.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerDeNS
from fairchem_dens.models.equiformer.plain import PlainEquiformer
from model_cases import EQUIFORMER, disturbed
from outputs import OUTPUTS, assert_learns, predict, rotation_errors
from precision import default_precision
from structures import conditioned, molecule

ROUNDING = 1e-10
"""Energies are some 1, forces and noise some 1 to 10; two layers with sums over ten neighbours stay below."""
STEP = 1e-4
"""Å (or units of a weight). Central differences are then wrong by some 1e-8, rounding adds 1e-12 / 1e-4."""

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
few_examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _double_precision() -> Iterator[None]:
    with default_precision(torch.float64):
        yield


def make_model(**changes: Any) -> EquiformerDeNS:
    """In evaluation mode, with biases and norms that are not the zeros and ones that they start as."""
    torch.manual_seed(0)
    return disturbed(EquiformerDeNS(**EQUIFORMER | changes)).eval()


@pytest.fixture(scope="module")
def model() -> EquiformerDeNS:
    return make_model(max_radius=3.0)


def make(seed: int, natoms: int = 9) -> Data:
    """A molecule as the corruption leaves it, with forces of a size that models know."""
    data = molecule(seed, natoms, scale=1.5)
    data.forces = torch.randn(natoms, 3, generator=torch.Generator().manual_seed(seed))
    return conditioned(data)


@pytest.fixture
def batch() -> Batch:
    return Batch.from_data_list([make(0), make(1, natoms=6)])


class TestRotation:
    @given(seeds)
    @few_examples
    def test_degree_2(self, model, batch, seed):
        torch.manual_seed(seed)
        assert max(rotation_errors(model, batch, o3.rand_matrix()).values()) < ROUNDING

    @pytest.mark.parametrize("changes", [L3, MIRRORED, {"irreps_sh": "1x0e+1x1e"}], ids=["L3", "odd", "L1"])
    def test_other_irreps(self, batch, changes):
        assert max(rotation_errors(make_model(**changes), batch, o3.rand_matrix()).values()) < ROUNDING

    def test_a_model_made_double_afterwards(self, batch):
        torch.set_default_dtype(torch.float32)
        try:
            model = make_model().double()
        finally:
            torch.set_default_dtype(torch.float64)
        assert max(rotation_errors(model, batch, o3.rand_matrix()).values()) < ROUNDING

    def test_mirror_images_are_told_apart_by_even_irreps_alone(self, model, batch):
        """What the paper has: its vectors are pseudovectors, so products mix what a mirror tells apart."""
        assert rotation_errors(model, batch, -torch.eye(3))["forces"] > 1e-3
        assert max(rotation_errors(make_model(**MIRRORED), batch, -torch.eye(3)).values()) < ROUNDING


@pytest.mark.slow  # e3nn compiles fifty tensor products for each model
class TestPlainPath:
    """The paper's way of computing, which the fast one is measured against."""

    @pytest.mark.parametrize("changes", [{}, L3, MIRRORED], ids=["L2", "L3", "odd"])
    def test_predicts_and_learns_the_same(self, batch, changes):
        """Predictions, and the gradients of a loss on all of them by all parameters."""
        gradients = []
        for kind in (lambda model: model, PlainEquiformer):
            model = make_model(max_radius=3.0, **changes)
            outputs = kind(model).train()(batch)
            loss = sum((outputs[name] ** 2).sum() for name in OUTPUTS)
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            gradients.append((outputs, found, [name for name, _ in model.named_parameters()]))
        (ours, by_ours, names), (theirs, by_theirs, _) = gradients
        for name in OUTPUTS:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=ROUNDING)
        for name, one, other in zip(names, by_ours, by_theirs, strict=True):
            other = torch.zeros_like(one) if other is None else other
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=name)

    def test_symmetry_and_exact_forces(self, model, batch):
        plain = PlainEquiformer(model).eval()
        assert max(rotation_errors(plain, batch, o3.rand_matrix()).values()) < ROUNDING
        forces, start = predict(plain, batch)["forces"], batch.pos.clone()
        direction = torch.randn_like(start)

        def energy(step: float) -> float:
            batch.pos = start + step * direction
            return float(predict(plain, batch)["energy"].sum())

        assert abs(along(energy) + float((forces * direction).sum())) < 1e-8


def test_forces_add_up_to_nothing(model, batch):
    """Nor do they turn a molecule, unless it is conditioned on forces that stay behind."""

    def total(values: Tensor) -> float:
        return float(torch.zeros(2, 3).index_add(0, batch.batch, values).abs().max())

    forces = predict(model, batch)["forces"]
    assert forces.abs().max() > 1e-2
    assert total(forces) < ROUNDING
    assert total(torch.linalg.cross(batch.pos, forces)) > 1e-3
    del batch.condition_forces
    assert total(torch.linalg.cross(batch.pos, predict(model, batch)["forces"])) < ROUNDING


def test_an_atom_out_of_reach_does_not_disturb_the_others(model):
    data = make(0)
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
        data = make(4, natoms=4)
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

    @pytest.mark.parametrize("others", [0, 1])
    def test_none_act_on_a_lone_atom(self, others):
        lone = make(5, natoms=1)
        batch = Batch.from_data_list([lone, *[make(seed) for seed in range(others)], lone])
        outputs = assert_learns(make_model().train(), batch)
        assert (outputs["forces"][0] == 0).all()


def test_molecular_dynamics_drifts_no_more_than_its_integrator():
    """The error in energy of velocity Verlet falls by four when the step is halved, if forces conserve it."""
    model = make_model(max_radius=50.0)
    data = make(0)
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
