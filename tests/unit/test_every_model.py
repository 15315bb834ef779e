"""Outputs, conditioning, settings, checkpoints and gradients, asked of each model alike.

What only one of the models has is tested in a file of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens import keys
from model_cases import MODELS, ModelCase, model_case
from outputs import assert_close, assert_equal, assert_learns, predict


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, model_settings: dict[str, Any]) -> ModelCase:
    return model_case(request.param, model_settings)


@pytest.fixture(scope="module")
def model(case: ModelCase) -> Any:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return case.build()


class TestOutputs:
    def test_names_and_shapes(self, model, corrupted):
        shapes = {name: tuple(value.shape) for name, value in predict(model, corrupted).items()}
        assert shapes == {keys.ENERGY: (2,), keys.FORCES: (19, 3), keys.NOISE: (19, 3)}

    def test_noise_head_costs_nothing_in_plain_inference(self, case, model, batch, corrupted):
        calls: list[str] = []
        head = model.get_submodule(case.noise_head)
        handle = head.register_forward_hook(lambda *_: calls.append("called"))
        try:
            assert set(predict(model, batch)) == {"energy", "forces"}
            assert not calls
            predict(model, corrupted)
            assert calls == ["called"]
        finally:
            handle.remove()

    def test_noise_in_training_also_without_conditioning(self, case, batch):
        assert set(case.fresh().train()(batch)) == {"energy", "forces", "noise"}

    def test_noise_has_its_own_head(self, case, model, corrupted):
        before = predict(model, corrupted)
        assert not torch.equal(before["noise"], before["forces"])
        doubled = copy.deepcopy(model)
        with torch.no_grad():
            doubled.get_parameter(case.noise_scale).mul_(2)
        after = predict(doubled, corrupted)
        assert torch.equal(after["forces"], before["forces"])
        assert torch.equal(after["energy"], before["energy"])
        torch.testing.assert_close(after["noise"], 2 * before["noise"])

    @pytest.mark.parametrize("training", [False, True])
    def test_predict_noise_false_keeps_the_head_unused(self, case, model, corrupted, training):
        without = case.fresh(predict_noise=False).train(training)
        assert set(without(corrupted)) == {"energy", "forces"}
        assert set(without.state_dict()) == set(model.state_dict())
        head = without.get_submodule(case.noise_head)
        assert not any(parameter.requires_grad for parameter in head.parameters())

    @pytest.mark.parametrize("training", [False, True])
    def test_regress_forces_false(self, case, corrupted, training):
        model = case.fresh(regress_forces=False).train(training)
        assert set(assert_learns(model, corrupted)) == {"energy"}
        assert not any("force_block" in name or "denoising" in name for name in model.state_dict())

    def test_labels_are_never_read(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.forces, corrupted.energy = 100 * corrupted.forces, 100 * corrupted.energy
        corrupted.noise_vec, corrupted.noise_mask = 100 * corrupted.noise_vec, ~corrupted.noise_mask
        assert_equal(predict(model, corrupted), expected)


class TestConditioning:
    def test_is_seen_by_its_structure_alone(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.condition_forces = 2 * corrupted.condition_forces
        found = predict(model, corrupted)
        for name in ("noise", "forces"):
            change = (found[name] - expected[name]).abs() / expected[name].abs().max()
            assert change[:12].max() > 1e-2, name
            assert change[12:].max() == 0, name
        assert found["energy"][0] != expected["energy"][0]
        assert found["energy"][1] == expected["energy"][1]

    def test_of_zero_is_none(self, model, batch):
        zero = batch.clone()
        zero.condition_forces = torch.zeros_like(batch.forces)
        found = predict(model, zero)
        assert torch.isfinite(found.pop("noise")).all()
        assert_equal(found, predict(model, batch))

    def test_is_hidden_without_force_encoding(self, case, batch, corrupted):
        model = case.build(use_force_encoding=False)
        outputs = predict(model, corrupted)
        others = corrupted.clone()
        others.condition_forces = torch.randn_like(others.forces)
        assert_equal(predict(model, others), outputs)
        del outputs["noise"]
        assert_equal(outputs, predict(model, batch))

    def test_bias_is_there_in_every_mode(self, case, model, batch, corrupted):
        """It has the same effect as that much more atom embedding, whatever is conditioned."""
        folded, without = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            embedding = folded.get_parameter(case.atom_embedding)
            embedding += folded.get_parameter(case.force_bias)
            folded.get_parameter(case.force_bias).zero_()
            without.get_parameter(case.force_bias).zero_()
        everything = corrupted.clone()
        everything.condition_forces = everything.forces
        for data in (batch, corrupted, everything):
            expected = predict(model, data)
            # Single precision, in eSCN through sums over 16 points that cancel.
            assert_close(predict(folded, data), expected, tolerance=1e-4)
            difference = predict(without, data)["energy"] - expected["energy"]
            assert difference.abs().max() > 1e-3 * expected["energy"].abs().max()


class TestSettings:
    def test_typo_is_refused_with_the_nearest_argument(self, case):
        with pytest.raises(ValueError, match=r"model\.num_layer'.*'num_layers'"):
            case.fresh(num_layer=3)

    @pytest.mark.parametrize("number", ["the first unknown one", 120, -1])
    def test_elements_out_of_range_name_number_structure_and_key(self, model, batch, number):
        number = model.max_num_elements if isinstance(number, str) else number
        batch.atomic_numbers[15] = number
        match = rf"Atomic number {number} of structure 1.*sid 1.*'model\.max_num_elements'"
        with pytest.raises(ValueError, match=match):
            predict(model, batch)

    @pytest.mark.parametrize("number", ["the last known one", 0])
    def test_ends_of_the_range_are_legal(self, model, batch, number):
        batch.atomic_numbers[15] = model.max_num_elements - 1 if isinstance(number, str) else number
        assert torch.isfinite(predict(model, batch)["energy"]).all()


class TestStateDict:
    def test_holds_parameters_only(self, model):
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
        assert model.num_params == sum(value.numel() for value in model.state_dict().values())

    def test_round_trip(self, case, model, corrupted):
        other = case.fresh()
        assert not torch.equal(predict(other, corrupted)["energy"], predict(model, corrupted)["energy"])
        other.load_state_dict(model.state_dict(), strict=True)
        assert_equal(predict(other, corrupted), predict(model, corrupted))

    def test_copies_and_pickles(self, model, corrupted, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert_equal(predict(other, corrupted), predict(model, corrupted))
            assert list(other.state_dict()) == list(model.state_dict())


class TestGradients:
    """Distributed training waits for the gradient of each parameter."""

    @pytest.mark.parametrize("kind", ["ordinary", "partly corrupted", "all conditioned", "lone atoms"])
    @pytest.mark.parametrize(
        "changes", [{}, {"use_force_encoding": False}, {"predict_noise": False}], ids=str
    )
    def test_each_parameter_has_one(self, case, structure, batch, corrupted, kind, changes):
        data = batch if kind == "ordinary" else corrupted
        if kind == "all conditioned":
            data.condition_forces, data.corrupted = data.forces, torch.tensor([True, True])
        if kind == "lone atoms":
            data = Batch.from_data_list([structure(0, natoms=1)] * 2)
            data.cell = 50 * torch.eye(3).expand(2, 3, 3)
        assert_learns(case.fresh(**changes).train(), data)

    def test_force_encoding_learns_all_degrees_from_conditioned_batches(self, case, corrupted):
        model = case.fresh().train()
        model(corrupted)["noise"].square().sum().backward()
        name, sizes = case.force_weights
        of_degrees = model.get_parameter(name).grad.split(sizes)
        assert all(gradient.abs().max() > 0 for gradient in of_degrees)
