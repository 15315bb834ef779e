"""Symmetries that each model has, and what it must leave alone.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding. What only
one of the models has is tested in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from model_cases import MODELS, ModelCase, model_case
from outputs import assert_close, assert_learns, joined, predict, relative_errors, transformed
from precision import default_precision, double_precision

ROUNDING = 1e-11
"""Relative to the largest output; sums over a hundred neighbours, and points that cancel, stay below."""

# All neighbours within the cutoff: which of two equally far ones to drop is no question of symmetry.
CHANGES: dict[str, dict[str, Any]] = {
    # Gates instead of grids make all of it equivariant up to rounding.
    "EquiformerV2DeNS": {
        "max_neighbors": 500, "max_radius": 4.0, "num_layers": 2, "use_gate_act": True, "use_grid_mlp": False,
    },
    "ESCNDeNS": {"max_neighbors": 500, "cutoff": 4.0, "mmax_list": [2], "num_sphere_samples": 32},
    "EquiformerDeNS": {"max_radius": 3.0},
}  # fmt: skip
PERIODIC = ("EquiformerV2DeNS", "ESCNDeNS")
OF_ATOMS = ("pos", "atomic_numbers", "fixed", "tags", "forces", "noise_mask", "condition_forces", "sigmas")

few_examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
every_model = pytest.mark.parametrize("name", MODELS, scope="module")
every_periodic_model = pytest.mark.parametrize("name", PERIODIC, scope="module")


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with double_precision(monkeypatch):
        yield


@pytest.fixture(scope="module")
def case(name: str, model_settings: dict[str, Any]) -> ModelCase:
    return model_case(name, model_settings)


@pytest.fixture(scope="module")
def build(name: str, case: ModelCase) -> Callable[..., Any]:
    return default_precision(torch.float64)(lambda **changes: case.build(**CHANGES[name] | changes))


@pytest.fixture(scope="module")
def model(build: Callable[..., Any]) -> Any:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return build()


@every_model
class TestSymmetries:
    @given(st.tuples(*[st.floats(-20, 20)] * 3))
    @few_examples
    def test_translation(self, model, batch, shift):
        moved = batch.clone()
        moved.pos = batch.pos + torch.tensor(shift)
        assert_close(predict(model, moved), predict(model, batch), ROUNDING)

    @given(seeds)
    @few_examples
    def test_outputs_permute_with_the_atoms(self, model, make, seed):
        data = make(0)
        order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))
        shuffled = data.clone()
        for name in OF_ATOMS:
            shuffled[name] = data[name][order]
        expected = predict(model, Batch.from_data_list([data]))
        expected = {name: value if name == "energy" else value[order] for name, value in expected.items()}
        assert_close(predict(model, Batch.from_data_list([shuffled])), expected, ROUNDING)

    def test_rotating_the_positions_alone_is_not_enough(self, model, batch):
        """The conditioning forces are seen: left behind, they change the answer."""
        matrix = o3.rand_matrix()
        wrong = transformed(batch, matrix)
        wrong.condition_forces = batch.condition_forces
        errors = relative_errors(predict(model, wrong), predict(model, transformed(batch, matrix)))
        assert min(errors.values()) > 1e-3, errors


@every_periodic_model
class TestImages:
    @given(seeds, st.integers(1, 3))
    @few_examples
    def test_atoms_may_be_any_of_their_periodic_images(self, model, batch, seed, furthest):
        """Trajectories and corrupted structures are not wrapped into the cell."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(-furthest, furthest + 1, batch.pos.shape, generator=generator).to(batch.pos)
        moved = batch.clone()
        moved.pos = batch.pos + torch.einsum("ni,nij->nj", images, batch.cell[batch.batch])
        assert_close(predict(model, moved), predict(model, batch), ROUNDING)

    @pytest.mark.parametrize("field", ["pos", "cell"])
    def test_positions_and_cell_do_matter(self, model, batch, field):
        """What other tests would not notice if the model ignored its input."""
        changed = batch.clone()
        changed[field] = 1.05 * changed[field]
        assert min(relative_errors(predict(model, changed), predict(model, batch)).values()) > 1e-4

    def test_without_any_cell_as_in_a_huge_box(self, build, make):
        structures = [make(0), make(1, natoms=7)]
        boxed = [data.clone() for data in structures]
        for data in boxed:
            data.cell = 1000 * torch.eye(3)[None]
        for data in structures:
            del data.cell, data.pbc
        found = predict(build(use_pbc=False), Batch.from_data_list(structures))
        assert_close(found, predict(build(), Batch.from_data_list(boxed)), ROUNDING)


@every_model
class TestBatching:
    @pytest.mark.parametrize(
        "periodicities", [["111"] * 4, ["011"] * 4, ["110"] * 4, ["000", "111", "110", "111"]], ids=",".join
    )
    @pytest.mark.parametrize("shape", [(1, 3), (3,)])
    def test_batch_equals_singles(self, model, make, periodicities, shape):
        """Also of different periodicity, and with ``pbc`` of shape (3,), which a batch holds as (3B,)."""
        sizes = ((0, 12), (1, 1), (2, 7), (3, 20))
        structures = [make(seed, natoms=natoms) for seed, natoms in sizes]
        for data, pbc in zip(structures, periodicities, strict=True):
            data.pbc = torch.tensor([axis == "1" for axis in pbc]).reshape(shape)
        together = predict(model, Batch.from_data_list(structures))
        alone = (predict(model, Batch.from_data_list([data])) for data in structures)
        assert_close(together, joined(alone), ROUNDING)

    def test_structures_of_a_batch_permute(self, model, make):
        sizes = {0: 12, 1: 9, 2: 5}
        forwards = [make(seed, natoms=natoms) for seed, natoms in sizes.items()]
        expected = predict(model, Batch.from_data_list(forwards))
        expected = {
            name: torch.cat(list(value.split(1 if name == "energy" else list(sizes.values())))[::-1])
            for name, value in expected.items()
        }
        assert_close(predict(model, Batch.from_data_list(forwards[::-1])), expected, ROUNDING)

    def test_identical_structures_have_identical_outputs(self, model, make):
        outputs = predict(model, Batch.from_data_list([make(0)] * 3))
        for name, value in outputs.items():
            first, *others = value.chunk(3)
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-13, atol=1e-13, msg=name)

    def test_conditioned_and_ordinary_structures_share_a_batch(self, model, make):
        """A zero force is as good as none, and a conditioned structure does not disturb an ordinary one."""
        ordinary = make(0)
        ordinary.condition_forces = torch.zeros_like(ordinary.forces)
        mixed = predict(model, Batch.from_data_list([ordinary, make(1)]))
        plain = Batch.from_data_list([ordinary, make(1)])
        del plain.condition_forces
        without = predict(model, plain)
        assert set(without) == {"energy", "forces"}
        for name, count in (("energy", 1), ("forces", 12)):
            scale = without[name].abs().max()
            assert (mixed[name][:count] - without[name][:count]).abs().max() < ROUNDING * scale
            assert (mixed[name][count:] - without[name][count:]).abs().max() > 1e-3 * scale

    def test_a_structure_that_is_no_batch(self, model, make):
        data = make(0)
        assert_close(predict(model, data), predict(model, Batch.from_data_list([data])), ROUNDING)


@every_model
class TestGradients:
    def test_are_finite_where_forces_are_zero(self, build, batch):
        batch.condition_forces[::2] = 0
        batch.condition_forces.requires_grad_()
        assert_learns(build().train(), batch)
        assert torch.isfinite(batch.condition_forces.grad).all()

    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize("is_conditioned", [True, False])
    def test_are_there_without_neighbours(self, build, make, others, is_conditioned):
        """Legal: a desorbed atom, or a lone atom in a large cell."""
        assert_learns_of_lone_atoms(build().train(), make, others, is_conditioned)


@every_periodic_model
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("is_conditioned", [True, False])
def test_gradients_are_there_without_neighbours_nor_cell(build, make, others, is_conditioned):
    assert_learns_of_lone_atoms(build(use_pbc=False).train(), make, others, is_conditioned)


def assert_learns_of_lone_atoms(
    model: Any, make: Callable[..., Data], others: int, is_conditioned: bool
) -> None:
    lone = make(5, natoms=1)
    lone.cell = 50 * torch.eye(3)[None]
    batch = Batch.from_data_list([lone, *[make(seed) for seed in range(others)], lone])
    if not is_conditioned:
        del batch.condition_forces
    outputs = assert_learns(model, batch)
    assert {name: len(value) for name, value in outputs.items()} == {
        "energy": 2 + others,
        "forces": 2 + 12 * others,
        "noise": 2 + 12 * others,
    }


@every_model
class TestLeavesAlone:
    @pytest.mark.parametrize("training", [False, True])
    def test_input(self, build, make, training):
        structures = [make(0), make(1, natoms=7)]
        for data in structures:
            data.pbc = torch.tensor([True, True, True])
            data.atomic_numbers = data.atomic_numbers.to(torch.uint8)
        batch = Batch.from_data_list(structures)
        before = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in batch.to_dict().items()
        }
        sum(value.sum() for value in build().train(training)(batch).values()).backward()
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
        assert all(torch.equal(first[name], second[name]) for name in first)


@every_periodic_model
def test_training_rolls_the_frames_reproducibly_from_the_seed(build, batch):
    model, outputs = build().train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(predict(model, batch)["forces"])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@every_model
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_atomic_numbers_of_any_type(model, batch, dtype):
    converted = batch.clone()
    converted.atomic_numbers = converted.atomic_numbers.to(dtype)
    for name, value in predict(model, batch).items():
        assert torch.equal(predict(model, converted)[name], value)
