"""Heads, ablations, refused settings, checkpoints and weight decay of the models."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.graph import edge_frames
from fairchem_dens.models.inputs import check_atomic_numbers, prepared

OWN = ("force_embedding.", "noise_schedule_sigma_embedding.", "denoising_pos_block.")
"""Parameters that a model without DeNS has no counterpart of."""


@pytest.fixture
def batch(structure: Callable[..., Data]) -> Batch:
    """Two ordinary structures, of 12 and 7 atoms."""
    return Batch.from_data_list([structure(0), structure(1, natoms=7)])


@pytest.fixture
def corrupted(batch: Batch) -> Batch:
    """The first structure corrupted in every other atom, the second an ordinary one; both with all fields."""
    batch = batch.clone()
    first = batch.batch == 0
    batch.noise_mask = first & (torch.arange(len(first)) % 2 == 0)
    batch.noise_vec = 0.1 * torch.randn(len(first), 3) * batch.noise_mask[:, None]
    batch.condition_forces = batch.forces * batch.noise_mask[:, None]
    batch.sigmas = 0.1 * first[:, None]
    batch.corrupted = torch.tensor([True, False])
    return batch


def build(settings: dict[str, Any], **changes: Any) -> EquiformerV2DeNS:
    torch.manual_seed(0)
    return EquiformerV2DeNS(**settings | changes).eval()


def randomised(model: EquiformerV2DeNS) -> EquiformerV2DeNS:
    """Biases and norms start as zeros and ones, which hides whether they are used."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def predict(model: torch.nn.Module, data: Data) -> dict[str, Tensor]:
    # The stock model switches gradients on by itself.
    with torch.no_grad():
        return {name: value.detach() for name, value in model(data).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def model(model_settings: dict[str, Any]) -> EquiformerV2DeNS:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return randomised(build(model_settings))


class TestOutputs:
    def test_shapes(self, model, corrupted):
        shapes = {name: tuple(value.shape) for name, value in predict(model, corrupted).items()}
        assert shapes == {"energy": (2,), "forces": (19, 3), "noise": (19, 3)}

    def test_no_noise_in_plain_inference(self, model, batch):
        assert set(predict(model, batch)) == {"energy", "forces"}

    def test_noise_head_costs_nothing_in_plain_inference(self, model, batch, corrupted):
        calls: list[str] = []
        handle = model.denoising_pos_block.register_forward_hook(lambda *_: calls.append("called"))
        try:
            predict(model, batch)
            assert not calls
            predict(model, corrupted)
            assert calls == ["called"]
        finally:
            handle.remove()

    def test_noise_in_training_also_without_conditioning(self, model_settings, batch):
        assert set(build(model_settings).train()(batch)) == {"energy", "forces", "noise"}

    def test_noise_has_its_own_head(self, model_settings, corrupted):
        model = build(model_settings)
        before = predict(model, corrupted)
        assert not torch.equal(before["noise"], before["forces"])
        with torch.no_grad():
            model.denoising_pos_block.proj.weight.mul_(2)
        after = predict(model, corrupted)
        assert torch.equal(after["forces"], before["forces"]) and torch.equal(
            after["energy"], before["energy"]
        )
        torch.testing.assert_close(after["noise"], 2 * before["noise"])

    @pytest.mark.parametrize("training", [False, True])
    def test_predict_noise_false_keeps_the_head_unused(self, model_settings, corrupted, training):
        model = build(model_settings, predict_noise=False).train(training)
        assert set(model(corrupted)) == {"energy", "forces"}
        assert set(model.state_dict()) == set(build(model_settings).state_dict())
        assert not any(parameter.requires_grad for parameter in model.denoising_pos_block.parameters())

    @pytest.mark.parametrize("training", [False, True])
    def test_regress_forces_false(self, model_settings, corrupted, training):
        model = build(model_settings, regress_forces=False).train(training)
        outputs = model(corrupted)
        assert set(outputs) == {"energy"}
        outputs["energy"].sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert not any("force_block" in name or "denoising" in name for name in model.state_dict())

    def test_conditioning_is_seen(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.condition_forces = 2 * corrupted.condition_forces
        found = predict(model, corrupted)
        assert (found["noise"][:12] - expected["noise"][:12]).abs().max() > 1e-3
        torch.testing.assert_close(found["noise"][12:], expected["noise"][12:], rtol=0, atol=1e-5)

    def test_labels_are_never_read(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.forces, corrupted.energy = 100 * corrupted.forces, 100 * corrupted.energy
        corrupted.noise_vec, corrupted.noise_mask = 100 * corrupted.noise_vec, ~corrupted.noise_mask
        assert_equal(predict(model, corrupted), expected)

    def test_energy_is_a_sum_over_atoms(self, model_settings, batch):
        one, two = (
            predict(randomised(build(model_settings, avg_num_nodes=n)), batch)["energy"] for n in (1, 2)
        )
        torch.testing.assert_close(one, 2 * two)


class TestBias:
    def test_is_there_in_every_mode(self, model_settings, batch, corrupted):
        """It has the same effect as that much more atom embedding, whatever is conditioned."""
        model = randomised(build(model_settings))
        folded = copy.deepcopy(model)
        with torch.no_grad():
            folded.sphere_embedding.weight += folded.force_embedding.bias
            folded.force_embedding.bias.zero_()
        everything = corrupted.clone()
        everything.condition_forces = everything.forces
        for data in (batch, corrupted, everything):
            found, expected = predict(folded, data), predict(model, data)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)

    def test_is_not_zero_in_that_test(self, model_settings, batch):
        model = randomised(build(model_settings))
        before = predict(model, batch)["energy"]
        torch.nn.init.zeros_(model.force_embedding.bias)
        assert (predict(model, batch)["energy"] - before).abs().max() > 1e-5


class TestAblations:
    def test_without_force_encoding_the_forces_are_not_seen(self, model_settings, batch, corrupted):
        model = randomised(build(model_settings, use_force_encoding=False))
        outputs = predict(model, corrupted)
        others = corrupted.clone()
        others.condition_forces = torch.randn_like(others.forces)
        assert_equal(predict(model, others), outputs)
        plain = predict(model, batch)
        assert torch.equal(plain["energy"], outputs["energy"]) and torch.equal(
            plain["forces"], outputs["forces"]
        )

    def test_without_denoising_energy_it_is_zero_on_corrupted_structures_only(
        self, model_settings, model, corrupted
    ):
        ablated = randomised(build(model_settings, use_denoising_energy=False))
        energy, expected = predict(ablated, corrupted)["energy"], predict(model, corrupted)["energy"]
        assert expected[0] != 0
        assert energy[0] == 0 and energy[1] == expected[1]

    def test_without_denoising_energy_ordinary_batches_are_as_ever(self, model_settings, model, batch):
        ablated = randomised(build(model_settings, use_denoising_energy=False))
        assert_equal(predict(ablated, batch), predict(model, batch))

    def test_without_denoising_energy_its_gradient_is_zero(self, model_settings, corrupted):
        corrupted.corrupted[:] = True
        model = build(model_settings, use_denoising_energy=False).train()
        model(corrupted)["energy"].sum().backward()
        assert all((parameter.grad == 0).all() for parameter in model.energy_block.parameters())

    def test_sigma_is_seen_if_encoded(self, model_settings, model, corrupted):
        encoding = randomised(build(model_settings, use_noise_schedule_sigma_encoding=True))
        extra = {"noise_schedule_sigma_embedding.weight", "noise_schedule_sigma_embedding.bias"}
        assert set(encoding.state_dict()) - set(model.state_dict()) == extra
        others = corrupted.clone()
        others.sigmas = 5 * others.sigmas
        found, expected = predict(encoding, others), predict(encoding, corrupted)
        assert (found["noise"][:12] - expected["noise"][:12]).abs().max() > 1e-4
        assert_equal(predict(model, others), predict(model, corrupted))

    def test_sigma_is_zero_in_ordinary_batches(self, model_settings, batch):
        encoding = randomised(build(model_settings, use_noise_schedule_sigma_encoding=True))
        zero = batch.clone()
        zero.sigmas = torch.zeros(19, 1)
        assert_equal(predict(encoding, batch), predict(encoding, zero))

    def test_linear_references(self, model_settings, batch):
        model = build(model_settings, load_energy_lin_ref=True)
        without = predict(model, batch)["energy"]
        assert not model.energy_lin_ref.requires_grad and model.energy_lin_ref.shape == (90,)
        torch.nn.init.normal_(model.energy_lin_ref)
        assert torch.equal(predict(model, batch)["energy"], without)
        model.use_energy_lin_ref = True
        of_atoms = model.energy_lin_ref[batch.atomic_numbers]
        references = torch.stack([of_atoms[batch.batch == i].sum() for i in range(2)])
        torch.testing.assert_close(predict(model, batch)["energy"], without + references)


class TestSettings:
    def test_typo_is_refused_with_the_nearest_argument(self, model_settings):
        with pytest.raises(ValueError, match=r"model\.num_layer'.*'num_layers'"):
            build(model_settings, num_layer=3)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("distance_function", "sigmoid"),
            ("use_tp_reparam", True),
            ("use_s2_act_attn", True),
            ("weight_init", "xavier"),
            ("norm_type", "batch_norm"),
            ("attn_activation", "relu"),
            ("ffn_activation", "relu"),
            ("grid_resolution", 4),
        ],
    )
    def test_unsupported_value_is_refused_by_name(self, model_settings, name, value):
        with pytest.raises(ValueError, match=rf"'model\.{name}'.*{value}"):
            build(model_settings, **{name: value})

    @pytest.mark.parametrize(
        "changes",
        [
            {"lmax_list": [2, 1], "mmax_list": [2, 1]},
            {"lmax_list": [2], "mmax_list": [3]},
            {"lmax_list": 2},
            {"lmax_list": [2], "mmax_list": [2, 2]},
            {"lmax_list": [12], "grid_resolution": None},
            {"lmax_list": [0], "mmax_list": [0]},
        ],
    )
    def test_unsupported_degrees_are_refused(self, model_settings, changes):
        """fairchem's blocks take lists but work with one resolution only."""
        with pytest.raises(ValueError, match=r"lmax_list|mmax_list"):
            build(model_settings, **changes)

    def test_references_that_are_not_held_cannot_be_used(self, model_settings):
        with pytest.raises(ValueError, match="load_energy_lin_ref"):
            build(model_settings, use_energy_lin_ref=True)

    def test_an_embedding_that_is_not_used_cannot_be_shared(self, model_settings):
        with pytest.raises(ValueError, match="use_atom_edge_embedding"):
            build(model_settings, share_atom_edge_embedding=True, use_atom_edge_embedding=False)

    @pytest.mark.parametrize(
        "changes",
        [
            {"norm_type": "layer_norm"},
            {"norm_type": "rms_norm_sh"},
            {"share_atom_edge_embedding": True},
            {"use_atom_edge_embedding": False},
            {"use_m_share_rad": True},
            {"use_attn_renorm": False},
            {"use_gate_act": True},
            {"use_grid_mlp": False},
            {"use_sep_s2_act": False},
            {"weight_init": "normal"},
            {"lmax_list": [3], "mmax_list": [1], "grid_resolution": None},
            {"attn_activation": "scaled_silu", "ffn_activation": "scaled_silu"},
        ],
        ids=str,
    )
    def test_supported_variants_predict_and_learn(self, model_settings, corrupted, changes):
        model = build(model_settings, **changes).train()
        outputs = model(corrupted)
        sum(value.square().sum() for value in outputs.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_takes_every_argument_of_the_stock_model_except_one(self):
        stock = set(inspect.signature(EquiformerV2).parameters) - {"use_pbc_single"}
        assert stock <= set(inspect.signature(EquiformerV2DeNS).parameters)

    def test_arguments_default_to_the_stock_models(self):
        ours, stock = (inspect.signature(one).parameters for one in (EquiformerV2DeNS, EquiformerV2))
        shared = set(ours) & set(stock)
        assert {name: ours[name].default for name in shared} == {name: stock[name].default for name in shared}


class TestAtomicNumbers:
    @pytest.mark.parametrize("number", [90, 120, -1])
    def test_out_of_range_names_number_structure_and_key(self, model, batch, number):
        batch.atomic_numbers[15] = number
        with pytest.raises(ValueError, match=rf"{number} of structure 1.*sid 1.*'model\.max_num_elements'"):
            predict(model, batch)

    @pytest.mark.parametrize("number", [0, 89])
    def test_ends_of_the_range_are_legal(self, model, batch, number):
        batch.atomic_numbers[15] = number
        assert torch.isfinite(predict(model, batch)["energy"]).all()

    def test_single_structure(self, structure):
        data = structure(0)
        with pytest.raises(ValueError, match="Atomic number 46"):
            check_atomic_numbers(data, 40)


class TestPrepared:
    def test_brings_fields_into_one_form(self, structure):
        data = structure(0)
        data.pbc, data.atomic_numbers = torch.tensor([True, True, False]), data.atomic_numbers.float()
        batch = Batch.from_data_list([data, data])
        assert batch.pbc.shape == (6,)
        ready = prepared(batch, 90)
        assert ready.pbc.tolist() == [[True, True, False]] * 2
        assert ready.atomic_numbers.dtype == torch.int64
        assert ready.natoms.tolist() == [12, 12]
        assert batch.pbc.shape == (6,) and batch.atomic_numbers.dtype == torch.float32

    def test_single_structure_becomes_a_batch_of_one(self, structure):
        ready = prepared(structure(0), 90)
        assert ready.natoms.tolist() == [12] and ready.batch.tolist() == [0] * 12


class TestStateDict:
    @pytest.mark.parametrize(
        "changes", [{}, {"use_noise_schedule_sigma_encoding": True, "load_energy_lin_ref": True}]
    )
    def test_holds_parameters_only(self, model_settings, changes):
        model = build(model_settings, **changes)
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]

    def test_round_trip(self, model_settings, model, corrupted):
        other = build(model_settings)
        assert not torch.equal(predict(other, corrupted)["energy"], predict(model, corrupted)["energy"])
        other.load_state_dict(model.state_dict(), strict=True)
        assert_equal(predict(other, corrupted), predict(model, corrupted))

    def test_copies_and_pickles(self, model, corrupted, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert_equal(predict(other, corrupted), predict(model, corrupted))
            assert list(other.state_dict()) == list(model.state_dict())


@pytest.fixture(scope="module")
def stock(model_settings: dict[str, Any]) -> EquiformerV2:
    """fairchem's own flat model, without DeNS, of the same arguments."""
    logging.disable(logging.WARNING)  # it says that it is deprecated
    try:
        torch.manual_seed(3)
        return randomised(EquiformerV2(**model_settings).eval())
    finally:
        logging.disable(logging.NOTSET)


class TestStockModel:
    @pytest.fixture
    def ours(self, stock, model_settings) -> EquiformerV2DeNS:
        ours = build(model_settings)
        torch.nn.init.zeros_(ours.force_embedding.bias)
        ours.load_state_dict(stock.state_dict(), strict=False)
        return ours

    def test_its_file_fills_everything_but_dens(self, stock, model_settings):
        assert any("SO3_grid" in name for name in stock.state_dict())
        result = build(model_settings).load_state_dict(stock.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert result.missing_keys and all(name.startswith(OWN) for name in result.missing_keys)

    def test_same_energy_and_forces(self, ours, stock, batch, monkeypatch):
        """To rounding, if it takes our frames of edges instead of rolling them at random."""
        monkeypatch.setattr(
            stock, "_init_edge_rot_mat", lambda data, edges, vectors: edge_frames(vectors, random_roll=False)
        )
        found, expected = predict(ours, batch), predict(stock, batch.clone())
        assert expected["forces"].abs().max() > 1e-2
        for name in ("energy", "forces"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-6)

    def test_same_energy_and_forces_with_its_own_frames(self, ours, stock, batch):
        """Within what its random roll changes from one pass to the next, through the finite grids."""
        found = predict(ours, batch)
        passes = [predict(stock, batch.clone()) for _ in range(8)]
        for name in ("energy", "forces"):
            values = torch.stack([one[name] for one in passes])
            spread = float((values - values.mean(dim=0)).abs().max())
            torch.testing.assert_close(found[name], values.mean(dim=0), rtol=0, atol=3 * spread + 1e-6)
            assert spread < 0.05 * float(values.abs().max())

    def test_bias_would_make_a_difference(self, ours, batch):
        before = predict(ours, batch)["energy"]
        torch.nn.init.normal_(ours.force_embedding.bias)
        assert (predict(ours, batch)["energy"] - before).abs().max() > 1e-4

    @pytest.mark.parametrize(
        ("setting", "value"), [("grid_resolution", 10), ("max_radius", 5.0), ("lmax_list", [3])]
    )
    def test_file_of_other_constants_is_refused(self, stock, model_settings, setting, value):
        model = build(model_settings, **{setting: value})
        with pytest.raises(ValueError, match=setting):
            model.load_state_dict(stock.state_dict(), strict=False)

    def test_decays_the_same_parameters(self, model, stock):
        """The list of the authors' code, of which fairchem's flat model has a copy."""
        own_ones = {name for name in model.no_weight_decay() if name.startswith(OWN)}
        assert model.no_weight_decay() - own_ones == stock.no_weight_decay()
        # The noise head is of the same kind as the force head.
        of_force_head = {name for name in model.no_weight_decay() if name.startswith("force_block.")}
        renamed = {name.replace("denoising_pos_block.", "force_block.") for name in own_ones}
        assert renamed - {"force_embedding.bias"} == of_force_head


class TestWeightDecay:
    def test_embeddings_are_decayed_and_biases_are_not(self, model_settings):
        model = build(model_settings, use_noise_schedule_sigma_encoding=True, share_atom_edge_embedding=True)
        kept = model.no_weight_decay()
        names = {name for name, _ in model.named_parameters()}
        assert kept <= names
        decayed = names - kept
        for name in ("sphere_embedding.weight", "source_embedding.weight", "target_embedding.weight",
                     "force_embedding.weight", "noise_schedule_sigma_embedding.weight"):  # fmt: skip
            assert name in decayed, name
        for name in ("force_embedding.bias", "noise_schedule_sigma_embedding.bias",
                     "norm.affine_weight", "norm.norm_l0.weight", "norm.norm_l0.bias"):  # fmt: skip
            assert name in kept, name
        assert not any(name.endswith("bias") for name in decayed)

    @pytest.mark.parametrize("norm_type", ["layer_norm", "layer_norm_sh", "rms_norm_sh"])
    def test_no_norm_is_decayed(self, model_settings, norm_type):
        model = build(model_settings, norm_type=norm_type)
        norms = {name for name, _ in model.named_parameters() if "norm" in name}
        assert norms and norms <= model.no_weight_decay()


class TestGradients:
    """Distributed training waits for the gradient of each parameter."""

    @pytest.mark.parametrize("kind", ["ordinary", "partly corrupted", "all conditioned"])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"use_noise_schedule_sigma_encoding": True},
            {"use_force_encoding": False},
            {"predict_noise": False},
        ],
    )
    def test_each_parameter_has_one(self, model_settings, batch, corrupted, kind, changes):
        data = batch if kind == "ordinary" else corrupted
        if kind == "all conditioned":
            data.condition_forces, data.corrupted = data.forces, torch.tensor([True, True])
        model = build(model_settings, **changes).train()
        sum(value.sum() for value in model(data).values()).backward()
        without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        assert not without
        assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)

    def test_force_encoding_is_learned_from_conditioned_batches(self, model_settings, corrupted):
        model = build(model_settings).train()
        model(corrupted)["noise"].square().sum().backward()
        assert (model.force_embedding.weight.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_number_of_parameters(model):
    assert model.num_params == sum(value.numel() for value in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 89_148_163),
        ({"num_layers": 20, "mmax_list": [3]}, 160_504_579),
        ({"num_layers": 18}, 127_509_763),
    ],
    ids=["OC20 2M", "OC20 All+MD", "OC22"],
)
def test_number_of_parameters_of_the_papers_models(changes, count):
    settings: dict[str, Any] = {
        "max_radius": 12.0,
        "num_layers": 12,
        "sphere_channels": 128,
        "attn_hidden_channels": 64,
        "num_heads": 8,
        "attn_alpha_channels": 64,
        "attn_value_channels": 16,
        "ffn_hidden_channels": 128,
        "norm_type": "layer_norm_sh",
        "lmax_list": [6],
        "mmax_list": [2],
        "grid_resolution": 18,
        "edge_channels": 128,
        "use_grid_mlp": True,
        "attn_activation": "silu",
        "ffn_activation": "silu",
        "weight_init": "uniform",
    }
    assert EquiformerV2DeNS(**settings | changes).num_params == count


def test_outputs_are_named_as_in_keys(model, corrupted):
    assert set(predict(model, corrupted)) == {keys.ENERGY, keys.FORCES, keys.NOISE}
