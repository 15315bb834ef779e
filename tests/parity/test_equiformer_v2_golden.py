"""EquiformerV2 + DeNS against outputs of the authors' own code, computed with their random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from fairchem_dens.models import EquiformerV2DeNS

TOLERANCE = 1e-5
"""Two passes of the authors' code differ by up to 3e-6, because they roll the frames of edges at random."""

FILES = ("eqv2_dens_l4m2.pt", "eqv2_dens_l2m2_sigma.pt")
MODES = ("s2ef", "dens_partial", "dens_full")


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, golden: Callable[[str], Any]) -> dict[str, Any]:
    return golden(request.param)


@pytest.fixture(scope="module")
def model(file: dict[str, Any]) -> EquiformerV2DeNS:
    model = EquiformerV2DeNS(**file["config"]).eval()
    model.load_state_dict(file["state_dict"], strict=True)
    return model


def batch_in(mode: str, file: dict[str, Any]) -> tuple[Data, Tensor]:
    """Our batch for one of their modes, and the atoms whose 'force' was the output of their noise head."""
    theirs = file["batch"]
    batch = Data(**{name: theirs[name] for name in ("cell", "pbc", "atomic_numbers", "natoms", "batch")})
    if mode == "s2ef":
        batch.pos = file["clean_pos"]
        return batch, torch.zeros(len(batch.pos), dtype=torch.bool)
    mask = theirs["noise_mask"] if mode == "dens_partial" else torch.ones_like(theirs["noise_mask"])
    batch.pos, batch.sigmas, batch.noise_mask = theirs["pos"], theirs["sigmas"], mask
    batch.condition_forces = theirs["forces"] * mask[:, None]
    batch.corrupted = torch.ones(len(batch.natoms), dtype=torch.bool)
    return batch, mask


@pytest.fixture
def blank(model: EquiformerV2DeNS) -> EquiformerV2DeNS:
    """The same model without what it learned; quicker than to build one."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    return blank


@pytest.mark.parametrize("mode", MODES)
def test_energy_forces_and_noise(file, model, mode):
    batch, mask = batch_in(mode, file)
    with torch.no_grad():
        outputs = model(batch)
    assert ("noise" in outputs) == (mode != "s2ef")
    merged = torch.where(mask[:, None], outputs.get("noise", outputs["forces"]), outputs["forces"])
    torch.testing.assert_close(outputs["energy"], file[mode]["energy"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(merged, file[mode]["forces"], rtol=0, atol=TOLERANCE)


def test_modes_are_far_apart(file):
    """By much more than the tolerance: agreement in one says nothing about another."""
    for one, other in ((0, 1), (1, 2)):
        difference = file[MODES[one]]["forces"] - file[MODES[other]]["forces"]
        assert difference.abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changed", ["force_embedding.weight", "denoising_pos_block.proj.weight", "force_block.proj.weight"]
)
def test_learned_parts_of_dens_are_compared(file, model, changed):
    """The agreement would not survive another weight."""
    batch, mask = batch_in("dens_partial", file)
    with torch.no_grad():
        outputs = torch.func.functional_call(model, {changed: 1.01 * model.get_parameter(changed)}, batch)
    merged = torch.where(mask[:, None], outputs["noise"], outputs["forces"])
    assert (merged - file["dens_partial"]["forces"]).abs().max() > 2 * TOLERANCE


@pytest.mark.parametrize("depth", [1, 2])
def test_loads_behind_the_prefixes_of_data_parallel_wrappers(file, model, blank, depth):
    """Checkpoints were saved from one or two wrappers, each of which adds ``module.``."""
    wrapped: nn.Module = blank
    for _ in range(depth):
        wrapped = nn.ModuleDict({"module": wrapped})
    prefix = "module." * depth
    wrapped.load_state_dict({prefix + name: value for name, value in file["state_dict"].items()}, strict=True)
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, model.state_dict()[name.removeprefix(prefix)])


def test_every_learned_value_is_the_files(file, model):
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(value, file["state_dict"][name]) for name, value in state.items())


def test_loading_does_not_change_the_file(file, blank):
    before = list(file["state_dict"])
    blank.load_state_dict(file["state_dict"])
    assert list(file["state_dict"]) == before


@pytest.mark.parametrize(("setting", "value"), [("grid_resolution", 16), ("max_radius", 7.0)])
def test_a_file_made_with_other_constants_is_refused(golden, setting, value):
    file = golden("eqv2_dens_l2m2_sigma.pt")
    model = EquiformerV2DeNS(**file["config"] | {setting: value})
    with pytest.raises(ValueError, match=setting):
        model.load_state_dict(file["state_dict"])


def test_missing_and_unknown_parameters_are_named(file, blank):
    state = dict(file["state_dict"])
    state["force_embeding.bias"] = state.pop("force_embedding.bias")
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*force_embedding\.bias.*Unexpected.*force_embeding\.bias"
    ):
        blank.load_state_dict(state)
