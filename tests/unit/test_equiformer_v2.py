"""EquiformerV2: ablations, settings, parameters, weight decay, and what it has in common with fairchem's."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import pytest
import torch
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.graph import build_graph, edge_frames
from fairchem_dens.models.inputs import prepared
from model_cases import disturbed
from outputs import assert_equal, assert_learns, predict

OWN = ("force_embedding.", "noise_schedule_sigma_embedding.", "denoising_pos_block.")
"""Parameters that a model without DeNS has no counterpart of."""


def build(settings: dict[str, Any], **changes: Any) -> EquiformerV2DeNS:
    torch.manual_seed(0)
    return EquiformerV2DeNS(**settings | changes).eval()


@pytest.fixture(scope="module")
def model(model_settings: dict[str, Any]) -> EquiformerV2DeNS:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return disturbed(build(model_settings))


def test_energy_is_a_sum_over_atoms(model_settings, batch):
    one, two = (predict(disturbed(build(model_settings, avg_num_nodes=n)), batch)["energy"] for n in (1, 2))
    torch.testing.assert_close(one, 2 * two)


class TestAblations:
    def test_without_denoising_energy_it_is_zero_on_corrupted_structures_only(
        self, model_settings, model, corrupted
    ):
        ablated = disturbed(build(model_settings, use_denoising_energy=False))
        energy, expected = predict(ablated, corrupted)["energy"], predict(model, corrupted)["energy"]
        assert expected[0] != 0
        assert energy[0] == 0 and energy[1] == expected[1]

    def test_without_denoising_energy_ordinary_batches_are_as_ever(self, model_settings, model, batch):
        ablated = disturbed(build(model_settings, use_denoising_energy=False))
        assert_equal(predict(ablated, batch), predict(model, batch))

    def test_without_denoising_energy_its_gradient_is_zero(self, model_settings, corrupted):
        corrupted.corrupted[:] = True
        model = build(model_settings, use_denoising_energy=False).train()
        model(corrupted)["energy"].sum().backward()
        assert all((parameter.grad == 0).all() for parameter in model.energy_block.parameters())

    def test_sigma_is_seen_if_encoded(self, model_settings, model, corrupted):
        encoding = disturbed(build(model_settings, use_noise_schedule_sigma_encoding=True))
        extra = {"noise_schedule_sigma_embedding.weight", "noise_schedule_sigma_embedding.bias"}
        assert set(encoding.state_dict()) - set(model.state_dict()) == extra
        others = corrupted.clone()
        others.sigmas = 5 * others.sigmas
        found, expected = predict(encoding, others), predict(encoding, corrupted)
        assert (found["noise"][:12] - expected["noise"][:12]).abs().max() > 1e-4
        assert_equal(predict(model, others), predict(model, corrupted))

    def test_sigma_is_zero_in_ordinary_batches(self, model_settings, batch):
        encoding = disturbed(build(model_settings, use_noise_schedule_sigma_encoding=True))
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
            ("recompute", "all"),
            ("kernels", "cuda"),
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
        assert_learns(build(model_settings, **changes).train(), corrupted)

    def test_takes_every_argument_of_the_stock_model_except_one(self):
        stock = set(inspect.signature(EquiformerV2).parameters) - {"use_pbc_single"}
        assert stock <= set(inspect.signature(EquiformerV2DeNS).parameters)

    def test_arguments_default_to_the_stock_models(self):
        ours, stock = (inspect.signature(one).parameters for one in (EquiformerV2DeNS, EquiformerV2))
        shared = set(ours) & set(stock)
        assert {name: ours[name].default for name in shared} == {name: stock[name].default for name in shared}


def test_state_dict_holds_optional_parameters_and_no_more(model_settings):
    model = build(model_settings, use_noise_schedule_sigma_encoding=True, load_energy_lin_ref=True)
    names = [name for name, _ in model.named_parameters()]
    assert list(model.state_dict()) == names
    assert {"noise_schedule_sigma_embedding.bias", "energy_lin_ref"} <= set(names)


@pytest.fixture(scope="module")
def stock(model_settings: dict[str, Any]) -> EquiformerV2:
    """fairchem's own flat model, without DeNS, of the same arguments."""
    logging.disable(logging.WARNING)  # it says that it is deprecated
    try:
        torch.manual_seed(3)
        return disturbed(EquiformerV2(**model_settings).eval())
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


@pytest.mark.parametrize("kind", ["ordinary", "partly corrupted", "all conditioned"])
def test_each_parameter_has_a_gradient_where_sigma_is_encoded(model_settings, batch, corrupted, kind):
    data = batch if kind == "ordinary" else corrupted
    if kind == "all conditioned":
        data.condition_forces, data.corrupted = data.forces, torch.tensor([True, True])
    assert_learns(build(model_settings, use_noise_schedule_sigma_encoding=True).train(), data)


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


class TestPaths:
    """Which code a model runs on is decided when it is built."""

    def test_is_said_once(self, model_settings, batch, caplog):
        with caplog.at_level(logging.INFO):
            model = build(model_settings, kernels="plain")
            predict(model, batch)
        said = [record.getMessage() for record in caplog.records if "Paths of EquiformerV2" in record.message]
        assert len(said) == 1
        assert "Attention plain" in said[0] and "VectorHead plain" in said[0]

    def test_kernels_that_cannot_be_had(self, model_settings, monkeypatch):
        monkeypatch.setitem(sys.modules, "fairchem_dens.ops.fused", None)
        assert build(model_settings, kernels="auto").operations.name == "plain"
        with pytest.raises(ValueError, match=r"'model\.kernels: triton' cannot be had here"):
            build(model_settings, kernels="triton")

    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_waits_for_a_device(self, model_settings, corrupted, monkeypatch, training):
        """After the search for neighbours, no operation's result decides on sizes or is read by the host."""
        model = build(model_settings, proj_drop=0.1, kernels="plain").train(training)
        graph = build_graph(prepared(corrupted, 90), cutoff=6.0, max_neighbors=12, strict=True, use_pbc=True,
                            otf_graph=True)  # fmt: skip
        monkeypatch.setattr("fairchem_dens.models.equiformer_v2.model.build_graph", lambda *_, **__: graph)
        monkeypatch.setattr("fairchem_dens.models.equiformer_v2.model.prepared", lambda data, _: data)
        waits = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                            "aten::_unique2", "aten::unique_dim", "aten::is_nonzero"):  # fmt: skip
                    waits.append(name)
                return func(*args, **(kwargs or {}))

        predict(model, corrupted)  # makes constants
        with Watch():
            outputs = model(corrupted)
            sum(value.square().sum() for value in outputs.values()).backward()
        assert not waits
