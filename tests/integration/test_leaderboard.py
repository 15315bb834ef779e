"""All the way by commands: data, training, evaluation, relaxations, submissions, a scorecard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Data

from fairchem_dens.cli.main import main
from fairchem_dens.data.emt import EmtSettings, simulate_system
from fairchem_dens.data.lmdb import LmdbWriter, read_lmdb
from initial_structures import write_initial_structures

pytestmark = pytest.mark.slow

SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
RELAXATION = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0}
STEPS = 20


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(params=["OC20", "EMT"])
def trajectories(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Files that ASE reads: relaxations from OC20, or made here."""
    if request.param == "OC20":
        find: Callable[[str], Path] = request.getfixturevalue("real_data")
        return str(find("oc20_trajectories") / "*.traj")
    folder = tmp_path / "trajectories"
    folder.mkdir()
    for sid in range(5):
        found = simulate_system(
            sid, EmtSettings(train_systems=5, val_systems=1, test_systems=1, frames_per_system=20)
        )
        frames = found.atoms
        for atoms, energy, forces in zip(frames, found.energies, found.forces, strict=True):
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        ase.io.write(folder / f"random{sid}.traj", frames)
    return str(folder / "*.traj")


def systems(structures: Iterable[Data]) -> list[list[Data]]:
    return [list(frames) for _, frames in groupby(structures, key=lambda data: data.sid)]


def write_test_splits(folder: Path, by_split: dict[str, list[Data]]) -> None:
    """Without labels, one below the other as the data sets come."""
    for split, structures in by_split.items():
        with LmdbWriter(folder / f"test_{split}", labels=False) as writer:
            for data in structures:
                blank = data.clone()
                del blank.energy, blank.forces
                writer.add(blank)


def test_from_trajectories_to_a_submission(
    trajectories: str, run_settings: dict[str, Any], fairchem: Any, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data"
    filters = ("--max-force", 50, "--max-energy-above", 10, "--max-atoms", 45, "--max-frames", 16)
    command("data", "from-ase", trajectories, "--energy", "relative", "--val", 1, *filters, "--out", data)

    # ------------------------------------------------ train, validate, predict
    dens = run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["includes"] = [str(data / "data.yml")]
    run_settings["dataset"] = {"train": {"transforms": {"dens": dens}}, "test": {"src": str(data / "val")}}
    wider = ("sphere_channels", "edge_channels", "ffn_hidden_channels", "attn_hidden_channels")
    run_settings["model"] |= dict.fromkeys(wider, 16) | {"alpha_drop": 0.0, "drop_path_rate": 0.0}
    run_settings["model"] |= {"avg_num_nodes": 10.0}
    run_settings["loss_functions"][0] = {"energy": {"fn": "mae", "coefficient": 30}}
    run_settings["optim"] |= {"max_epochs": 50, "lr_initial": 0.01, "eval_every": 10_000}
    fairchem("train", run_settings)
    checkpoint = fairchem.file()
    arguments = ("--checkpoint", str(checkpoint))
    validated = fairchem("validate", run_settings, *arguments).split("Evaluating on val.")[1]
    assert "forces_mae" in validated
    fairchem("predict", run_settings, *arguments)
    results = fairchem.results()
    forces = np.split(results["forces"], results["chunk_idx"])
    predicted = {
        str(name): (energy.item(), force)
        for name, energy, force in zip(results["ids"], results["energy"], forces, strict=True)
    }
    val = list(read_lmdb(data / "val"))
    assert predicted.keys() == {f"{frame.sid}_{frame.fid}" for frame in val}

    # ------------------------------------------------ a submission of energies and forces
    by_split = {split: val[place :: len(SPLITS)] for place, split in enumerate(SPLITS)}
    write_test_splits(tmp_path / "s2ef", by_split)
    out = tmp_path / "s2ef.npz"
    build = ("submission", "s2ef", "--dataset", "oc20", *arguments, "--test-lmdbs", tmp_path / "s2ef")
    command(*build, "--cpu", "--out", out)
    command("submission", "check", out, "--test-lmdbs", tmp_path / "s2ef")
    with np.load(out) as submission:
        for split, frames in by_split.items():
            assert sorted(submission[f"{split}_ids"]) == sorted(
                f"{frame.sid}_{frame.fid}" for frame in frames
            )
            assert submission[f"{split}_forces"].dtype == np.float16
            for name, force in zip(
                submission[f"{split}_ids"],
                np.split(submission[f"{split}_forces"], submission[f"{split}_chunk_idx"]),
                strict=True,
            ):
                np.testing.assert_allclose(force, predicted[str(name)][1], rtol=2e-3, atol=1e-4)

    # ------------------------------------------------ a scorecard
    for split, frames in by_split.items():
        with LmdbWriter(tmp_path / "labelled" / split) as writer:
            for frame in frames:
                writer.add(frame)
    named = [f"{split}={tmp_path / 'labelled' / split}" for split in SPLITS]
    command("evaluate", *arguments, "--cpu", "--splits", *named, "--out", tmp_path / "scores")
    card = json.loads((tmp_path / "scores" / "scorecard.json").read_text())
    for split, frames in by_split.items():
        both = [(predicted[f"{frame.sid}_{frame.fid}"], frame) for frame in frames]
        energy_errors = [abs(energy - frame.energy) for (energy, _), frame in both]
        free = [(force, frame.forces[frame.fixed == 0].numpy()) for (_, force), frame in both]
        force_errors = np.concatenate([np.abs(force - label) for force, label in free])
        found = card["splits"][split]
        assert found["energy_mae"] == pytest.approx(1000 * np.mean(energy_errors), rel=2e-3)
        assert found["forces_mae"] == pytest.approx(1000 * force_errors.mean(), rel=2e-3)

    # ------------------------------------------------ relaxations
    # Of systems that it was trained on: a model this small knows nothing of others.
    initial = {str(frames[0].sid): frames[0] for frames in systems(read_lmdb(data / "train"))}
    to_relax = {split: [start] for split, start in zip(SPLITS, initial.values(), strict=True)}
    for split, structures in to_relax.items():
        write_initial_structures(tmp_path / "is2re" / f"test_{split}", structures)
    sources: dict[str, list[object]] = {"is2re": [], "is2rs": []}
    lowered = []
    for split in SPLITS:
        folder = tmp_path / "relaxed" / split
        run_settings["dataset"]["relax"] = {"src": str(tmp_path / "is2re" / f"test_{split}")}
        run_settings["task"] = {
            "relaxation_steps": STEPS,
            "relaxation_fmax": 0.02,
            "write_pos": True,
            "relax_opt": RELAXATION | {"traj_dir": str(folder)},
        }
        fairchem("run-relaxations", run_settings, *arguments, name=split)
        positions = tmp_path / "results" / split / "relaxed_positions.npz"
        option = f"--{split.replace('_', '-')}"
        sources["is2re"] += [option, folder]
        sources["is2rs"] += [option, positions]
        for structure in to_relax[split]:
            frames = ase.io.read(folder / f"{structure.sid}.traj", ":")
            lowered.append(frames[-1].get_potential_energy() - frames[0].get_potential_energy())
            fixed = structure.fixed.numpy() == 1
            assert np.array_equal(frames[-1].positions[fixed], frames[0].positions[fixed])
            assert (frames[-1].positions[~fixed] != frames[0].positions[~fixed]).any()
    print("energies by", STEPS, "steps, eV:", np.round(lowered, 3))
    # The forces are a head of their own and not quite the gradient: near its end one may rise a little.
    assert np.mean(lowered) < -0.3 and max(lowered) < 0.05

    # ------------------------------------------------ submissions of relaxed energies and structures
    for task, given in sources.items():
        out = tmp_path / f"{task}.npz"
        lmdbs = ("--test-lmdbs", tmp_path / "is2re")
        command("submission", task, "--dataset", "oc20", *given, *lmdbs, "--out", out)
        command("submission", "check", out, *lmdbs)
    with np.load(tmp_path / "is2re.npz") as submission:
        for split, structures in to_relax.items():
            energies = dict(
                zip(submission[f"{split}_ids"], submission[f"{split}_energy"].reshape(-1), strict=True)
            )
            for structure in structures:
                last = ase.io.read(tmp_path / "relaxed" / split / f"{structure.sid}.traj")
                assert energies[str(structure.sid)] == pytest.approx(last.get_potential_energy(), abs=1e-5)
