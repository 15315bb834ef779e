"""Own data all the way: files that ASE reads, `fairchem-dens data from-ase`, the real `fairchem` command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from fairchem_dens.cli.main import main
from fairchem_dens.data.lmdb import read_lmdb


def on_data(folder: Path, settings: dict[str, Any], **optim: Any) -> dict[str, Any]:
    """The small run of `run_settings` on what `data.yml` says, and nothing else, about the data."""
    dens = settings["dataset"]["train"]["transforms"]["dens"]
    settings["includes"] = [str(folder / "data" / "data.yml")]
    settings["dataset"] = {"train": {"transforms": {"dens": dens}}}
    settings["optim"] |= optim
    del settings["task"]
    return settings


def convert(folder: Path, *arguments: object) -> dict[str, Any]:
    command = ["data", "from-ase", *map(str, arguments), "--out", str(folder / "data"), "--workers", "1"]
    assert main(command) == 0
    return json.loads((folder / "data" / "summary.json").read_text())


def losses(output: str) -> np.ndarray:
    """The logged loss of each training step; evaluations log no learning rate."""
    return np.array([float(loss) for loss in re.findall(r"\bloss: (\S+?),.* lr: ", output)])


@pytest.fixture
def relaxations(tmp_path: Path) -> Path:
    """Four short relaxations with EMT, as ASE writes them."""
    folder = tmp_path / "relaxations"
    folder.mkdir()
    for place, metal in enumerate(("Cu", "Pd", "Ag", "Ni")):
        slab = fcc111(metal, (2, 2, 2), vacuum=6.0)
        add_adsorbate(slab, "O", 1.4, "ontop" if place % 2 else "fcc")
        slab.pbc = True
        slab.set_tags(0)
        slab.set_constraint(FixAtoms(indices=range(4)))
        slab.calc = EMT()
        BFGS(slab, logfile=None, trajectory=str(folder / f"random{place}.traj")).run(fmax=0.01, steps=3)
    return folder


def test_relaxations_train(relaxations, tmp_path, run_settings, fairchem):
    summary = convert(tmp_path, relaxations / "*.traj", "--energy", "relative", "--val", 2)
    assert summary["splits"]["train"]["frames"] == summary["splits"]["val"]["frames"] == 8
    output = fairchem("train", on_data(tmp_path, run_settings, max_epochs=1))
    assert len(losses(output)) == 2 and np.isfinite(losses(output)).all()
    assert "DeNS corrupts each structure with probability p = 0.5" in output
    # The trainer looks at a sample of the targets and complains where a normaliser does not fit.
    assert "rmsd" not in output.split("DeNS corrupts")[1].split("step: ")[0]
    assert fairchem.file().is_file()


def test_two_commands(relaxations, tmp_path, fairchem):
    """From files to a run: what the first command writes is all that the second needs."""
    convert(tmp_path, relaxations / "*.traj", "--val", 1)
    smaller = ["--model.num_layers=1", "--model.sphere_channels=8", "--model.ffn_hidden_channels=8"]
    smaller += ["--model.lmax_list=[2]", "--model.grid_resolution=8", "--optim.max_epochs=1"]
    output = fairchem("train", tmp_path / "data" / "train.yml", *smaller, "--optim.num_workers=0")
    assert len(losses(output)) == 3 and np.isfinite(losses(output)).all()
    assert "DeNS corrupts each structure with probability p = 0.5" in output


@pytest.mark.slow
def test_real_trajectories_train_with_falling_loss(real_data, tmp_path, run_settings, fairchem):
    """OC20 relaxations by one command, then a few hundred steps of a small EquiformerV2 with DeNS.

    Few frames many times: on fresh ones, so few steps show less than the difference from batch to batch.
    """
    summary = convert(
        tmp_path,
        real_data("oc20_trajectories") / "*.traj",
        *("--energy", "relative", "--max-force", 50, "--max-energy-above", 10),
        *("--max-atoms", 60, "--max-frames", 8),
    )
    assert [found["systems"] for found in summary["splits"].values()] == [8, 1]
    wider = ("sphere_channels", "edge_channels", "ffn_hidden_channels")
    run_settings["model"] |= dict.fromkeys(wider, 32) | {"num_layers": 2, "attn_hidden_channels": 16}
    run_settings["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0}
    logged = losses(fairchem("train", on_data(tmp_path, run_settings, max_epochs=16, eval_every=10_000)))
    assert len(logged) == 256
    first, last = logged[:64].mean(), logged[-64:].mean()
    print(f"loss {first:.1f} over the first 64 steps, {last:.1f} over the last 64")
    assert last < 0.85 * first


@pytest.mark.slow
def test_predicted_energies_of_oxides_are_totals(real_data, tmp_path, run_settings, fairchem):
    """References by element are taken off in training and put back in predictions."""
    summary = convert(
        tmp_path, real_data("oc22/oxides.db"), "--energy", "referenced", "--val", 0.2, "--test", 0.2
    )
    settings = on_data(tmp_path, run_settings, max_epochs=1)
    fairchem("train", settings)
    fairchem("predict", settings, "--checkpoint", str(fairchem.file()))
    predicted = fairchem.results()
    totals = {f"{s.sid}_{s.fid}": s.energy for s in read_lmdb(tmp_path / "data" / "test")}
    assert sorted(totals) == sorted(predicted["ids"])
    errors = np.abs(predicted["energy"].ravel() - [totals[name] for name in predicted["ids"]])
    assert predicted["energy"].dtype == np.float32
    assert errors.mean() < 0.2 * summary["splits"]["test"]["energy_std"]
    assert errors.mean() < 5 * summary["normalizers"]["energy"]["rmsd"]
