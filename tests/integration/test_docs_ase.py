"""The code of docs/ase.md, piece after piece, on a model of the very system."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import yaml
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT

from fairchem_dens.data.lmdb import LmdbWriter, data_from_atoms
from initial_structures import write_initial_structures

PAGE = Path(__file__).parents[2] / "docs" / "ase.md"
CHECKS = """
import json
print("RESULT", json.dumps({
    "energy": energy,
    "forces": forces.tolist(),
    "relaxed": [relaxed.get_potential_energy(), float(np.linalg.norm(relaxed.get_forces(), axis=1).max())],
    "temperatures": temperatures,
    "path": path,
    "frequencies": [[value.real, value.imag] for value in frequencies],
}))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)


def write_emt(folder: Path, count: int, *, seed: int) -> Path:
    """Copper with oxygen somewhere on it, computed with EMT."""
    rng = np.random.default_rng(seed)
    with LmdbWriter(folder) as writer:
        for fid in range(count):
            atoms = fcc111("Cu", size=(2, 2, 3), vacuum=8.0)
            add_adsorbate(atoms, "O", rng.uniform(0.9, 1.8), tuple(rng.uniform(0, 5, 2)))
            atoms.pbc = True
            atoms.positions += rng.normal(scale=0.05, size=(len(atoms), 3))
            atoms.calc = EMT()
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            if np.linalg.norm(forces, axis=1).max() < 10:
                writer.add(data_from_atoms(atoms, sid=0, fid=fid, energy=energy, forces=forces))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, run_settings: dict[str, Any], fairchem: Any) -> Path:
    train = run_settings["dataset"]["train"]
    train["src"] = str(write_emt(tmp_path / "train", 160, seed=0))
    run_settings["dataset"] = {"train": train}
    train["transforms"]["normalizer"] = {
        "energy": {"mean": 5.0, "rmsd": 1.0},
        "forces": {"mean": 0.0, "rmsd": 1.0},
    }
    wider = ("sphere_channels", "attn_hidden_channels", "ffn_hidden_channels", "edge_channels")
    run_settings["model"] |= dict.fromkeys(wider, 16) | {"alpha_drop": 0.0, "drop_path_rate": 0.0}
    run_settings["optim"] |= {"max_epochs": 8, "batch_size": 8, "lr_initial": 0.01}
    fairchem("train", run_settings)
    return fairchem.file()


@pytest.mark.slow
def test_the_code_runs_as_it_stands(checkpoint: Path, python: Callable[..., str], tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path / "checkpoint.pt")
    said = python("\n".join(blocks("python")) + CHECKS)
    found = json.loads(said.split("RESULT")[1])
    print(said.split("RESULT")[0])

    forces = np.array(found["forces"])
    assert forces.shape == (13, 3) and (forces[:4] == 0).all() and (forces[4:] != 0).any()
    trajectory = ase.io.read(tmp_path / "relaxed.traj", ":")
    assert trajectory[0].get_potential_energy() == pytest.approx(found["energy"], abs=1e-5)
    assert found["relaxed"][0] < found["energy"] and found["relaxed"][1] < 0.05
    assert np.array_equal(trajectory[0].positions[:4], trajectory[-1].positions[:4])

    dynamics = ase.io.read(tmp_path / "dynamics.traj", ":")
    assert len(dynamics) == 11
    assert np.array_equal(dynamics[0].positions[:4], dynamics[-1].positions[:4])
    assert (dynamics[0].positions[4:] != dynamics[-1].positions[4:]).all()
    assert 50 < np.mean(found["temperatures"]) < 1000
    assert len(found["path"]) == 5 and np.isfinite(found["path"]).all()
    assert found["path"][0] == pytest.approx(found["relaxed"][0], abs=1e-5)
    assert len(found["frequencies"]) == 3 and np.isfinite(found["frequencies"]).all()


@pytest.mark.slow
def test_the_yaml_relaxes(
    trained: Path, run_settings: dict[str, Any], fairchem: Any, tmp_path: Path, structure: Callable[..., Any],
) -> None:  # fmt: skip
    structures = [structure(0, natoms=8), structure(1, natoms=9)]
    write_initial_structures(tmp_path / "initial_structures", structures)
    (text,) = blocks("yaml")
    page = yaml.safe_load(text)
    page["task"]["relaxation_steps"] = 3
    settings = run_settings | {"task": page["task"], "dataset": run_settings["dataset"] | page["dataset"]}
    for name in ("first", "again"):
        fairchem("run-relaxations", settings, "--checkpoint", str(trained), name=name)
        assert fairchem.results(name, "relaxed_positions.npz")["ids"].tolist() == ["0", "1"]
    assert len(ase.io.read(tmp_path / "trajectories" / "1.traj", ":")) == 4
