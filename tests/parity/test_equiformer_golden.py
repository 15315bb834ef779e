"""Equiformer + DeNS against outputs of the authors' own code, computed with their random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from fairchem_dens.models import EquiformerDeNS
from fairchem_dens.models.equiformer.plain import PlainEquiformer

TOLERANCE = 1e-5
FILE = "equiformer_md17_dens_l2.pt"
MODES = ("s2ef", "dens")


@pytest.fixture(scope="module")
def file(golden: Callable[[str], Any]) -> dict[str, Any]:
    return golden(FILE)


@pytest.fixture(scope="module")
def model(file: dict[str, Any]) -> EquiformerDeNS:
    model = EquiformerDeNS(**file["config"]).eval()
    model.load_state_dict(file["state_dict"], strict=True)
    return model


def batch_in(mode: str, file: dict[str, Any]) -> Data:
    """Our batch for one of their modes."""
    theirs = file["batch"]
    batch = Data(atomic_numbers=theirs["z"], batch=theirs["batch"], natoms=theirs["batch"].bincount())
    if mode == "s2ef":
        batch.pos = file["clean_pos"]
    else:
        batch.pos, batch.condition_forces = theirs["pos"], theirs["force"]
    return batch


def merged(outputs: dict[str, Tensor], mode: str, file: dict[str, Any]) -> Tensor:
    """Forces, and the noise in place of those of corrupted atoms, which is what their model returns."""
    if mode == "s2ef":
        return outputs["forces"]
    return torch.where(file["batch"]["noise_mask"][:, None], outputs["noise"], outputs["forces"])


def expected(mode: str, file: dict[str, Any]) -> Tensor:
    return file[mode]["forces" if mode == "s2ef" else "dy"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("path", ["ours", pytest.param("plain", marks=pytest.mark.slow)])
def test_energy_forces_and_noise(file, model, mode, with_gradients, path):
    predictor = model if path == "ours" else PlainEquiformer(model).eval()
    with torch.set_grad_enabled(with_gradients):
        outputs = predictor(batch_in(mode, file))
    assert ("noise" in outputs) == (mode == "dens")
    torch.testing.assert_close(outputs["energy"], file[mode]["energy"][:, 0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(merged(outputs, mode, file), expected(mode, file), rtol=0, atol=TOLERANCE)


def test_training_mode_predicts_the_same(file, model):
    """There is no dropout in it."""
    trained = copy.deepcopy(model).train()
    outputs = trained(batch_in("dens", file))
    torch.testing.assert_close(merged(outputs, "dens", file), expected("dens", file), rtol=0, atol=TOLERANCE)


def test_modes_are_far_apart(file):
    """By much more than the tolerance, in the structure that is corrupted in one of them."""
    mask = file["batch"]["noise_mask"]
    corrupted = file["batch"]["batch"] == file["batch"]["batch"][mask][0]
    difference = (expected("dens", file) - expected("s2ef", file)).abs()
    assert difference[corrupted & ~mask].max() > 100 * TOLERANCE
    assert difference[mask].max() > 1000 * TOLERANCE
    assert difference[~corrupted].max() == 0


def test_every_learned_parameter_is_compared(file, model):
    """The agreement would not survive other weights, whichever they are, but for one.

    A bias on scalars that the noise, a vector, is not made of.
    """
    without_effect = "denoising_pos_head.sep_value.lin.bias.0"
    chosen = file["batch"]["batch"] == 1
    batch = batch_in("dens", file).subgraph(chosen)
    batch.batch, batch.natoms = torch.zeros_like(batch.batch), batch.natoms[1:2]
    mask = file["batch"]["noise_mask"][chosen, None]

    def values(outputs: dict[str, Tensor]) -> Tensor:
        atoms = torch.where(mask, outputs["noise"], outputs["forces"])
        return torch.cat([outputs["energy"], atoms.flatten()])

    theirs = torch.cat([file["dens"]["energy"][1], expected("dens", file)[chosen].flatten()])
    assert (values(model(batch)) - theirs).abs().max() < TOLERANCE
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        changed = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            outputs = torch.func.functional_call(model, {name: changed}, batch)
        change = (values(outputs) - theirs).abs().max()
        assert (change > 2 * TOLERANCE) == (name != without_effect), name
