"""From layout to layout, the model stays the same: against stock fairchem's own models, loaded strictly.

The weights are the authors' (random ones, where those files are at hand) and random ones of ours, wrapped as
published checkpoints are. fairchem's EquiformerV2 rolls the frames of edges at random, which moves forces by
some 1e-6; here it is given the frames that ours uses, so that nothing but the layout is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_dens import EqV2DeNSBackbone
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from fairchem.core.models.escn.escn import eSCN
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from fairchem_dens.checkpoints import stock
from fairchem_dens.checkpoints.convert import export_checkpoint, import_checkpoint, strip_checkpoint
from fairchem_dens.checkpoints.layouts import flattened
from fairchem_dens.models import EquiformerV2DeNS, ESCNDeNS
from fairchem_dens.models.equiformer_v2 import paths
from fairchem_dens.models.graph import edge_frames
from fairchem_dens.models.state import is_constant

Case = tuple[dict[str, Any], Data]
"""A checkpoint as the authors publish it, and a batch."""

TOLERANCE = 1e-6
GOLDEN = ("eqv2_dens_l4m2.pt", "eqv2_dens_l2m2_sigma.pt", "escn_dens_l4m2.pt")
SYNTHETIC = ("equiformer_v2", "equiformer_v2 with sigma and shared embeddings", "escn")
_NEVER_TRAINED = ("energy_lin_ref", "sphere_points", "sphharm_weights.0")


@pytest.fixture(autouse=True)
def same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_imports()
    for model in (EquiformerV2Backbone, EquiformerV2):
        monkeypatch.setattr(
            model,
            "_init_edge_rot_mat",
            lambda _self, _data, _edges, vectors: edge_frames(vectors, random_roll=False),
        )


def published(name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Wrap weights as the authors' checkpoints are: prefixes, old names, a state of the run."""
    trained = [key for key in weights if not is_constant(key) and key not in _NEVER_TRAINED]
    return {
        "epoch": 11.9,
        "step": 1000,
        "state_dict": {f"module.module.{key}": value for key, value in weights.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 999},
        "ema": {
            "decay": 0.999,
            "num_updates": None,
            "shadow_params": [1.03 * weights[key] for key in trained],
            "collected_params": [],
        },
        "normalizers": {
            "target": {"mean": torch.tensor(-0.755), "std": torch.tensor(2.887)},
            "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(2.887)},
            "denoising_pos_target": {"mean": torch.tensor(0.0), "std": torch.tensor(0.1)},
        },
        "config": {
            "trainer": "denoising_forces",
            "model": name,
            "model_attributes": dict(config),
            "task": {"dataset": "trajectory_lmdb", "primary_metric": "forces_mae"},
            "dataset": {"src": "somewhere"},
            "optim": {
                "use_denoising_pos": True,
                "denoising_pos_coefficient": 10,
                "denoising_pos_params": {
                    "prob": 0.5,
                    "fixed_noise_std": True,
                    "std": 0.1,
                    "corrupt_ratio": 0.5,
                },
            },
        },
        "val_metrics": None,
        "amp": None,
    }


def from_golden(file: Mapping[str, Any], name: str) -> Case:
    theirs = file["batch"]
    batch = Data(**{key: theirs[key] for key in ("cell", "pbc", "atomic_numbers", "natoms", "batch")})
    batch.pos = file["clean_pos"]
    return published(name, file["config"], file["state_dict"]), batch


def from_random_weights(kind: str, settings: dict[str, Any], batch: Data) -> Case:
    if kind == "escn":
        names = ("use_pbc", "regress_forces", "otf_graph", "max_neighbors", "max_num_elements", "num_layers",
                 "sphere_channels", "lmax_list", "mmax_list", "edge_channels")  # fmt: skip
        settings = {name: settings[name] for name in names}
        settings |= {"hidden_channels": 8, "num_sphere_samples": 16, "cutoff": 6.0}
        return published("escn_dens", settings, shaken(ESCNDeNS(**settings)).state_dict()), batch
    if "sigma" in kind:
        settings = settings | {
            "use_noise_schedule_sigma_encoding": True,
            "share_atom_edge_embedding": True,
            "norm_type": "rms_norm_sh",
            "mmax_list": [1],
        }
    built = shaken(stock.dens_hydra("equiformer_v2", settings).built)
    # fairchem's own model, under the authors' names: with its constant buffers, as the authors' have them.
    flat, _ = flattened(built.state_dict())
    order = list(EquiformerV2DeNS(**settings).state_dict())
    places = {name: index for index, name in enumerate(order)}
    ordered = sorted(flat, key=lambda name: places.get(name, -1))
    return published("equiformer_v2_dens", settings, {name: flat[name] for name in ordered}), batch


def shaken(model: nn.Module) -> nn.Module:
    """Biases start at zero and would hide what is lost."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[*GOLDEN, *SYNTHETIC])
def case(
    request: pytest.FixtureRequest,
    golden: Callable[[str], Any],
    model_settings: dict[str, Any],
    structure: Callable[..., Data],
) -> Case:
    if request.param in SYNTHETIC:
        return from_random_weights(request.param, dict(model_settings), two(structure))
    name = "escn_dens" if "escn" in request.param else "equiformer_v2_dens"
    return from_golden(golden(request.param), name)


@pytest.fixture(params=SYNTHETIC)
def random_case(
    request: pytest.FixtureRequest, model_settings: dict[str, Any], structure: Callable[..., Data]
) -> Case:
    return from_random_weights(request.param, dict(model_settings), two(structure))


def two(structure: Callable[..., Data]) -> Data:
    return Batch.from_data_list([structure(1, natoms=9), structure(2, natoms=11)])


def loaded_strictly(checkpoint: Mapping[str, Any]) -> nn.Module:
    settings = copy.deepcopy(checkpoint["config"]["model"])
    model = registry.get_model_class(settings.pop("name"))(**settings)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    return model.eval()


def predicted(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = model(copy.copy(batch))
    return {name: outputs[name] for name in ("energy", "forces")}


def as_published(checkpoint: dict[str, Any], batch: Data, *, on_fairchem: bool = False) -> dict[str, Tensor]:
    """What the weights predict in our model, loaded without any of what is tested here.

    With ``on_fairchem`` on fairchem's modules, for comparisons bit for bit: ours round differently.
    """
    config = checkpoint["config"]
    model = {"escn_dens": ESCNDeNS, "equiformer_v2_dens": EquiformerV2DeNS}[config["model"]]
    built = model(**config["model_attributes"]).eval()
    weights = {name.removeprefix("module.module."): value for name, value in checkpoint["state_dict"].items()}
    built.load_state_dict(weights, strict=True)
    if on_fairchem:
        paths.choose(built, paths.FAIRCHEM)
    return predicted(built, batch)


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, value in expected.items():
        assert value.abs().max() > 20 * tolerance, "agreement would say nothing"
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance)


def tolerance_of(checkpoint: dict[str, Any]) -> float:
    """eSCN's energies are a thousandth of its other numbers, and so are forces at the start."""
    return 2e-8 if checkpoint["config"]["model"] == "escn_dens" else TOLERANCE


def test_import(case):
    checkpoint, batch = case
    imported, said = import_checkpoint(checkpoint)
    tolerance = tolerance_of(checkpoint)
    assert_equal(predicted(loaded_strictly(imported), batch), as_published(checkpoint, batch), tolerance)
    assert set(imported["normalizers"]) == {"energy", "forces"}
    assert imported["normalizers"]["energy"]["rmsd"] == pytest.approx(2.887)
    assert imported["normalizers"]["energy"]["mean"] == pytest.approx(-0.755)
    assert imported["config"]["loss_functions"][-1] == {"noise": {"fn": "l2mae", "coefficient": 10.0}}
    assert not any(is_constant(name) for name in imported["state_dict"])
    assert "optimizer" not in imported and imported["step"] == 1000
    assert any("optimizer" in line for line in said)


def test_export_to_fairchems_own_dens_and_back(case):
    checkpoint, batch = case
    if checkpoint["config"]["model"] == "escn_dens":
        with pytest.raises(ValueError, match=r"DeNS for EquiformerV2 alone.*--plain"):
            export_checkpoint(checkpoint)
        return
    imported, _ = import_checkpoint(checkpoint)
    exported, _ = export_checkpoint(imported)
    model = loaded_strictly(exported)
    assert isinstance(model, HydraModel) and isinstance(model.backbone, EqV2DeNSBackbone)
    assert_equal(predicted(model, batch), as_published(checkpoint, batch))
    back, _ = import_checkpoint(exported)
    assert list(back["state_dict"]) == list(imported["state_dict"])
    for name, value in imported["state_dict"].items():
        assert torch.equal(back["state_dict"][name], value), name
    for ours, theirs in zip(back["ema"]["shadow_params"], imported["ema"]["shadow_params"], strict=True):
        assert torch.equal(ours, theirs)
    assert back["normalizers"] == imported["normalizers"]
    given = checkpoint["config"]["model_attributes"]
    found = back["config"]["model"]
    assert {name: found[name] for name in given if name in found} == {
        name: value for name, value in given.items() if name in found
    }


@pytest.mark.parametrize("way", ["strip", "export --plain"])
def test_without_dens(case, way):
    checkpoint, batch = case
    is_escn = checkpoint["config"]["model"] == "escn_dens"
    imported, _ = import_checkpoint(checkpoint)
    if way == "strip":
        plain, _ = strip_checkpoint(imported)
        model = loaded_strictly(plain)
        assert type(model) is (eSCN if is_escn else EquiformerV2)
        assert plain["config"]["model"]["name"] == ("escn" if is_escn else "equiformer_v2")
    else:
        plain, _ = export_checkpoint(imported, with_dens=False)
        model = loaded_strictly(plain)
        assert isinstance(model, HydraModel)
        assert is_escn or type(model.backbone) is EquiformerV2Backbone
    expected = as_published(checkpoint, batch)
    found = predicted(model, batch)
    assert_equal(found, expected, tolerance_of(checkpoint))
    if not is_escn:  # eSCN's frames cannot be given: they are drawn inside its forward pass
        for name, value in as_published(checkpoint, batch, on_fairchem=True).items():
            assert torch.equal(found[name], value), "folding the biases must be exact"
    assert not any("force_embedding" in name or "denoising" in name for name in plain["state_dict"])

    back, _ = import_checkpoint(plain, new_dens=True)
    assert_equal(predicted(loaded_strictly(back), batch), expected, tolerance_of(checkpoint))
    with pytest.raises(ValueError, match=r"plain model.*--new-dens"):
        import_checkpoint(plain)


def test_the_biases_matter(case):
    """Leaving them out, instead of folding them in, would show."""
    checkpoint, batch = case
    imported, _ = import_checkpoint(checkpoint)
    for name, value in imported["state_dict"].items():
        if name in ("force_embedding.bias", "noise_schedule_sigma_embedding.bias"):
            imported["state_dict"][name] = torch.zeros_like(value)
    tolerance = tolerance_of(checkpoint)
    difference = (
        predicted(loaded_strictly(imported), batch)["energy"] - as_published(checkpoint, batch)["energy"]
    )
    assert difference.abs().max() > 10 * tolerance


@pytest.mark.parametrize("way", ["dens", "plain", "strip"])
def test_the_average_becomes_the_weights(random_case, way):
    """The stored average is 1.03 times the weights; as weights it predicts what these do."""
    checkpoint, batch = random_case
    if way == "dens" and checkpoint["config"]["model"] == "escn_dens":
        pytest.skip("fairchem has no eSCN with DeNS")
    averaged = copy.copy(checkpoint)
    averaged["state_dict"] = {
        name: value if is_constant(name) or name.split(".", 2)[2] in _NEVER_TRAINED else 1.03 * value
        for name, value in checkpoint["state_dict"].items()
    }
    convert: Callable[..., Any] = strip_checkpoint if way == "strip" else export_checkpoint
    options = {} if way == "strip" else {"with_dens": way == "dens"}
    used, said = convert(checkpoint, average="use", **options)
    assert used["ema"] is None and "made the moving average the weights" in said[-1]
    expected, tolerance = as_published(averaged, batch), tolerance_of(checkpoint)
    assert_equal(predicted(loaded_strictly(used), batch), expected, tolerance)

    kept, _ = convert(checkpoint, **options)
    model = loaded_strictly(kept)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(trainable, kept["ema"]["shadow_params"], strict=True):
            parameter.copy_(value)
    assert_equal(predicted(model, batch), expected, tolerance)

    dropped, _ = convert(checkpoint, average="drop", **options)
    assert dropped["ema"] is None
    assert_equal(predicted(loaded_strictly(dropped), batch), as_published(checkpoint, batch), tolerance)
