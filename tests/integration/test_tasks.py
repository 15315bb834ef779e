"""What fairchem does with a checkpoint of ours: validate, predict, run-relaxations and `OCPCalculator`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from torch_geometric.data import Batch, Data

from fairchem_dens.cli.main import main
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.models import EquiformerV2DeNS
from initial_structures import write_initial_structures
from model_cases import EQUIFORMER, MODELS, model_case

Settings = dict[str, Any]


@pytest.fixture
def initial_structures(tmp_path: Path, structure: Callable[..., Data]) -> Path:
    """Five, more than a batch and not the same number for each of two ranks."""
    return write_initial_structures(
        tmp_path / "is2re", [structure(500 + place, natoms=9 + place) for place in range(5)]
    )


def to_relax(settings: Settings, folder: Path, trajectories: Path | None, **task: Any) -> Settings:
    optimizer = {"maxstep": 0.04, "memory": 50, "damping": 1.0, "alpha": 70.0}
    settings["dataset"]["relax"] = {"src": str(folder)}
    settings["task"] |= {
        "relaxation_steps": 15,
        "relaxation_fmax": 0.02,
        "write_pos": True,
        "relax_opt": optimizer | {"traj_dir": None if trajectories is None else str(trajectories)},
        **task,
    }
    return settings


def as_atoms(data: Data) -> Atoms:
    return Atoms(
        data.atomic_numbers.numpy(), data.pos.numpy(), cell=data.cell[0].numpy(), pbc=True,
        tags=data.tags.numpy(), constraint=FixAtoms(mask=data.fixed.numpy() == 1),
    )  # fmt: skip


def by_hand(
    checkpoint: Path, structures: Iterable[Data], *, averaged: bool
) -> list[tuple[float, np.ndarray]]:
    """Energy and forces on free atoms of each structure, by nothing but the model and what the file holds."""
    loaded = torch.load(checkpoint, weights_only=True)
    settings = dict(loaded["config"]["model"])
    assert settings.pop("name") == "fairchem_dens.models.EquiformerV2DeNS"
    model = EquiformerV2DeNS(**settings).eval()
    model.load_state_dict({name.removeprefix("module."): w for name, w in loaded["state_dict"].items()})
    if averaged:
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        for weight, average in zip(trainable, loaded["ema"]["shadow_params"], strict=True):
            weight.data.copy_(average)
    scales = {name: (float(n["mean"]), float(n["rmsd"])) for name, n in loaded["normalizers"].items()}
    results = []
    for data in structures:
        with torch.no_grad():
            out = model(Batch.from_data_list([data]))
        mean, rmsd = scales["energy"]
        forces = out["forces"][data.fixed == 0] * scales["forces"][1]
        results.append((out["energy"].item() * rmsd + mean, forces.numpy()))
    return results


def by_id(results: dict[str, np.ndarray]) -> dict[str, tuple[float, np.ndarray]]:
    forces = np.split(results["forces"], results["chunk_idx"])
    return {
        str(name): (energy.item(), force)
        for name, energy, force in zip(results["ids"], results["energy"], forces, strict=True)
    }


def logged(output: str, metric: str) -> float:
    """The metric that `validate` says, rounded to four digits."""
    (value,) = re.findall(rf"\b{metric}: (\S+?),", output.split("Evaluating on val.")[1])
    return float(value)


CALCULATOR = """
import json
import numpy as np
from ase.io import read
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from fairchem.core import OCPCalculator

calculator = OCPCalculator(checkpoint_path="CHECKPOINT", cpu=True)
frames, said = read("structures.traj", ":"), []
for atoms in frames:
    atoms.calc = calculator
    free = np.setdiff1d(range(len(atoms)), atoms.constraints[0].index)
    forces = atoms.get_forces(apply_constraint=False)[free]
    said.append([atoms.get_potential_energy(), forces.tolist()])

atoms = frames[0]
start = atoms.positions.copy()
BFGS(atoms, logfile=None).run(fmax=0.001, steps=4)
relaxed = atoms.positions.copy()
VelocityVerlet(atoms, timestep=1.0).run(4)
moved = [np.abs(relaxed - start).max(axis=1).tolist(), np.abs(atoms.positions - relaxed).max(axis=1).tolist()]
print("RESULT", json.dumps([said, moved]))
"""


def test_validate_predict_and_calculator_agree(
    fairchem: Any, run_settings: Settings, trained: Path, lmdb_folders: dict[str, Path], python: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """All three with the averaged weights of a file that also holds the last ones."""
    structures = list(read_lmdb(lmdb_folders["val"]))
    run_settings["dataset"]["test"] = dict(run_settings["dataset"]["val"])
    run_settings["task"] = {"prediction_dtype": "float32"}
    fairchem("predict", run_settings, "--checkpoint", str(trained))
    predicted = by_id(fairchem.results())
    assert predicted.keys() == {f"{data.sid}_{data.fid}" for data in structures}

    averaged, last = (by_hand(trained, structures, averaged=choice) for choice in (True, False))
    for data, (energy, forces), (other, _) in zip(structures, averaged, last, strict=True):
        name = f"{data.sid}_{data.fid}"
        assert predicted[name][0] == pytest.approx(energy, abs=1e-5)
        assert np.abs(predicted[name][1] - forces).max() < 1e-5
        assert abs(energy - other) > 1e-2

    output = fairchem("validate", run_settings, "--checkpoint", str(trained))
    labels = np.array([data.energy for data in structures])
    errors = np.abs([energy for energy, _ in averaged] - labels)
    assert logged(output, "energy_mae") == pytest.approx(errors.mean(), abs=1e-4)
    force_errors = [
        np.abs(forces - data.forces[data.fixed == 0].numpy())
        for data, (_, forces) in zip(structures, averaged, strict=True)
    ]
    assert logged(output, "forces_mae") == pytest.approx(np.concatenate(force_errors).mean(), abs=1e-4)
    assert "denoising" not in output.split("Evaluating on val.")[1]

    # A process that knows only fairchem.
    ase.io.write(tmp_path / "structures.traj", [as_atoms(data) for data in structures])
    said = python(CALCULATOR.replace("CHECKPOINT", str(trained)))
    calculated, (relaxed, moved) = json.loads(said.split("RESULT")[1])
    for data, (energy, forces) in zip(structures, calculated, strict=True):
        name = f"{data.sid}_{data.fid}"
        assert predicted[name][0] == pytest.approx(energy, abs=1e-5)
        assert np.abs(predicted[name][1] - np.array(forces)).max() < 1e-5
    free = structures[0].fixed.numpy() == 0
    for distances in (np.array(relaxed), np.array(moved)):
        assert (distances[free] > 0).all() and (distances[~free] == 0).all()


@pytest.fixture(params=MODELS)
def each_model(request: pytest.FixtureRequest, run_settings: Settings, model_settings: Settings) -> Settings:
    """Settings of a run with each of our models."""
    case = model_case(request.param, model_settings)
    run_settings["model"] = {"name": f"fairchem_dens.models.{request.param}", **case.settings}
    return run_settings


def counted(trainer: Any) -> Counter[str]:
    """How often each direct part of the model runs from now on, and the model itself as ''."""
    calls: Counter[str] = Counter()

    def count(part: str) -> Callable[..., None]:
        return lambda *_: calls.update([part])

    model = trainer._unwrapped_model
    model.register_forward_pre_hook(count(""))
    for part, module in model.named_children():
        module.register_forward_pre_hook(count(part))
    return calls


def test_the_noise_head_rests(
    each_model: Settings, model_settings: Settings, make_trainer: Any, initial_structures: Path
) -> None:
    to_relax(each_model, initial_structures, None, relaxation_steps=2)
    trainer = make_trainer(each_model)
    calls = counted(trainer)
    head = model_case(type(trainer._unwrapped_model).__name__, model_settings).noise_head

    trainer.validate("val", disable_tqdm=True)
    assert calls[""] == 2 and calls[head] == 0
    trainer.predict(trainer.test_loader, results_file="predictions", disable_tqdm=True)
    assert calls[""] == 4 and calls[head] == 0
    trainer.run_relaxations()
    assert calls[""] >= 6 and calls[head] == 0
    trainer.train(disable_eval_tqdm=True)  # evaluates nothing
    assert calls[head] == 12


def test_predictions_without_gradients_have_forces(
    each_model: Settings, make_trainer: Any, tmp_path: Path
) -> None:
    """fairchem predicts under `no_grad`; Equiformer's forces are a gradient all the same."""
    each_model["task"] = {"prediction_dtype": "float32"}
    trainer = make_trainer(each_model)
    with torch.enable_grad():
        (batch, *_) = trainer.test_loader
        forces = trainer.model.eval()(batch)["forces"].detach() * 0.7
    runs = []
    for _ in range(2):
        trainer.predict(trainer.test_loader, results_file="predictions", disable_tqdm=True)
        (file,) = tmp_path.rglob("s2ef_predictions.npz")
        with np.load(file) as arrays:
            runs.append(by_id(dict(arrays)))
    first = runs[0][f"{int(batch.sid[0])}_0"][1]
    expected = forces[(batch.batch == 0) & (batch.fixed == 0)].numpy()
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for name, (energy, forces) in runs[0].items():
        assert runs[1][name][0] == energy and np.array_equal(runs[1][name][1], forces)


@pytest.mark.slow
def test_two_runs_predict_the_same_bits(
    fairchem: Any, run_settings: Settings, trained: Path, initial_structures: Path
) -> None:
    """From structures without labels and without frame numbers, and with no training data at hand."""
    run_settings["task"] = {"prediction_dtype": "float32"}
    run_settings["dataset"]["test"]["src"] = str(initial_structures)
    del run_settings["dataset"]["train"]["src"], run_settings["dataset"]["val"]
    for name in ("one", "two"):
        fairchem("predict", run_settings, "--checkpoint", str(trained), name=name)
    one, two = fairchem.results("one"), fairchem.results("two")
    assert one["ids"].tolist() == [str(500 + place) for place in range(5)]
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)

    # Halves, as leaderboards take them, are those of the same numbers.
    del run_settings["task"]["prediction_dtype"]
    fairchem("predict", run_settings, "--checkpoint", str(trained), name="halves")
    halves = fairchem.results("halves")
    assert halves["forces"].dtype == np.float16
    assert np.array_equal(halves["forces"], one["forces"].astype(np.float16))


@pytest.mark.slow
def test_relaxations_on_one_rank_and_on_two(
    fairchem: Any, run_settings: Settings, initial_structures: Path, tmp_path: Path
) -> None:
    """Down the gradient of a smooth energy, which must fall then.

    Smooth, because no atom crosses the cutoff. Without memory L-BFGS is steepest descent: a model that has
    learned nothing curves the wrong way, and then L-BFGS climbs.
    """
    name = {"name": "fairchem_dens.models.EquiformerDeNS"}
    run_settings["model"] = name | EQUIFORMER | {"max_radius": 30.0, "otf_graph": True}
    normalizer = run_settings["dataset"]["train"]["transforms"]["normalizer"]
    normalizer["energy"] = {"mean": 0.0, "rmsd": 20.0}
    normalizer["forces"] = {"mean": 0.0, "rmsd": 20.0}
    run_settings["optim"]["max_epochs"] = 1
    fairchem("train", run_settings)
    structures = {str(data.sid): data for data in read_lmdb(initial_structures)}
    found: dict[str, dict[str, list[Atoms]]] = {}
    for ranks in ("1", "2"):
        folder = tmp_path / f"trajectories-{ranks}"
        settings = to_relax(run_settings, initial_structures, folder)
        settings["task"]["relax_opt"]["memory"] = 0
        arguments = ("--checkpoint", str(fairchem.file()), "--num-gpus", ranks)
        fairchem("run-relaxations", settings, *arguments, name=f"relaxed-{ranks}")
        assert {path.name for path in folder.iterdir()} == {f"{sid}.traj" for sid in structures}
        found[ranks] = {path.stem: ase.io.read(path, ":") for path in folder.iterdir()}

        positions = fairchem.results(f"relaxed-{ranks}", "relaxed_positions.npz")
        assert positions["ids"].tolist() == sorted(structures)
        relaxed = dict(zip(positions["ids"], np.split(positions["pos"], positions["chunk_idx"]), strict=True))
        for sid, data in structures.items():
            frames = found[ranks][sid]
            energies = [atoms.get_potential_energy() for atoms in frames]
            assert energies == sorted(energies, reverse=True) and energies[-1] < energies[0] - 0.01
            moved = np.abs(relaxed[sid] - data.pos.numpy()).max(axis=1)
            free = data.fixed.numpy() == 0
            assert (moved[~free] == 0).all() and moved[free].max() > 0.01
            end = frames[-1].copy()
            end.positions -= relaxed[sid]
            end.wrap(eps=1e-3)  # fairchem writes frames inside the cell, and positions as they come
            assert np.abs(end.positions).max() < 1e-4
            assert np.linalg.norm(frames[-1].get_forces(), axis=1).max() < 0.02 or len(frames) == 16
    # Once more, on another number of ranks: nothing is relaxed again, and nothing is missing.
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = fairchem("run-relaxations", settings, "--checkpoint", str(fairchem.file()), name="again")
    assert "Relaxed before: 500.traj" in said
    assert files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = fairchem.results("again", "relaxed_positions.npz")
    assert np.array_equal(again["ids"], positions["ids"])
    np.testing.assert_allclose(again["pos"], positions["pos"], atol=1e-5)

    for sid in structures:
        one, two = found["1"][sid], found["2"][sid]
        assert len(one) == len(two)
        assert one[-1].get_potential_energy() == pytest.approx(two[-1].get_potential_energy(), abs=1e-3)


def test_relaxations_are_scored_where_there_are_labels(
    run_settings: Settings, make_trainer: Any, structure: Callable[..., Data], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Under the names of OC20's LMDBs of relaxations, of which fairchem expects another for the energy."""
    structures = [structure(600 + place, natoms=9 + place) for place in range(3)]
    for data in structures:
        data.y_relaxed, data.pos_relaxed = 0.5, data.pos + 0.1
    initial = write_initial_structures(tmp_path / "is2re", structures)
    to_relax(run_settings, initial, tmp_path / "trajectories", relaxation_steps=2, relaxation_fmax=0.0)
    run_settings["dataset"]["relax"]["key_mapping"] = {"y_relaxed": "energy_relaxed"}
    with caplog.at_level("INFO"):
        make_trainer(run_settings).run_relaxations()
    energies = [
        ase.io.read(tmp_path / "trajectories" / f"{data.sid}.traj").get_potential_energy()
        for data in structures
    ]
    (said,) = re.findall(r"'energy_mae': \{.*?'metric': (?:\w+\()*([\d.e-]+)", caplog.text)
    assert float(said) == pytest.approx(np.abs(np.array(energies) - 0.5).mean(), abs=1e-5)


def as_authors_write(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint as the authors' code would have left it: names, wrappers, constants."""
    model = dict(checkpoint["config"]["model"])
    del model["name"]
    stock = EquiformerV2(**{key: value for key, value in model.items() if key != "predict_noise"})
    weights = {name.removeprefix("module."): w for name, w in checkpoint["state_dict"].items()}
    constants = {name: value for name, value in stock.state_dict().items() if name not in weights}
    assert len(constants) > 5
    scales = checkpoint["normalizers"]
    return {
        "epoch": checkpoint["epoch"],
        "step": checkpoint["step"],
        "state_dict": {f"module.module.{name}": value for name, value in (weights | constants).items()},
        "normalizers": {
            old: {"mean": scales[name]["mean"], "std": scales[name]["rmsd"]}
            for old, name in (("target", "energy"), ("grad_target", "forces"))
        },
        "config": {
            "trainer": "denoising_forces",
            "model": "equiformer_v2_dens",
            "model_attributes": model,
            "task": {"dataset": "trajectory_lmdb", "prediction_dtype": "float32"},
            "dataset": {"src": "gone", "normalize_labels": True},
            "optim": {
                "batch_size": 4,
                "energy_coefficient": 2,
                "force_coefficient": 100,
                "use_denoising_pos": True,
                "denoising_pos_params": {"prob": 0.5, "fixed_noise_std": True, "std": 0.1},
                "denoising_pos_coefficient": 10,
            },
            "cmd": {"seed": 1},
        },
        "ema": checkpoint["ema"],
        "val_metrics": {},
        "amp": None,
    }


@pytest.mark.slow
def test_a_checkpoint_of_the_authors(
    fairchem: Any, run_settings: Settings, trained: Path, tmp_path: Path, python: Any, lmdb_folders: Any
) -> None:
    """Imported, it does what the checkpoint of ours with the same weights does."""
    theirs, imported = tmp_path / "theirs.pt", tmp_path / "imported.pt"
    torch.save(as_authors_write(torch.load(trained, weights_only=True)), theirs)
    assert main(["checkpoint", "import", str(theirs), str(imported)]) == 0

    run_settings["task"] = {"prediction_dtype": "float32"}
    for name, file in (("ours", trained), ("imported", imported)):
        fairchem("predict", run_settings, "--checkpoint", str(file), name=name)
    ours, same = fairchem.results("ours"), fairchem.results("imported")
    assert all(ours[name].tobytes() == same[name].tobytes() for name in ours)
    said = [
        fairchem("validate", run_settings, "--checkpoint", str(file), name="val")
        for file in (trained, imported)
    ]
    assert logged(said[0], "forces_mae") == logged(said[1], "forces_mae")

    structures = list(read_lmdb(lmdb_folders["test"]))
    ase.io.write(tmp_path / "structures.traj", [as_atoms(data) for data in structures])
    calculated = json.loads(python(CALCULATOR.replace("CHECKPOINT", str(imported))).split("RESULT")[1])[0]
    predicted = by_id(ours)
    for data, (energy, forces) in zip(structures, calculated, strict=True):
        name = f"{data.sid}_{data.fid}"
        assert predicted[name][0] == pytest.approx(energy, abs=1e-5)
        assert np.abs(predicted[name][1] - np.array(forces)).max() < 1e-5


@pytest.mark.slow
def test_relaxations_use_averaged_weights(
    fairchem: Any, run_settings: Settings, trained: Path, initial_structures: Path, tmp_path: Path
) -> None:
    settings = to_relax(run_settings, initial_structures, tmp_path / "trajectories", relaxation_steps=3)
    fairchem("run-relaxations", settings, "--checkpoint", str(trained))
    structures = list(read_lmdb(initial_structures))
    for data, (energy, _) in zip(structures, by_hand(trained, structures, averaged=True), strict=True):
        first = ase.io.read(tmp_path / "trajectories" / f"{data.sid}.traj", 0)
        assert first.get_potential_energy() == pytest.approx(energy, abs=1e-5)


@pytest.mark.slow
def test_validate_on_two_ranks(fairchem: Any, run_settings: Settings, trained: Path) -> None:
    """Six structures: nothing is counted twice."""
    run_settings["optim"]["eval_batch_size"] = 3
    said = [
        fairchem("validate", run_settings, "--checkpoint", str(trained), "--num-gpus", ranks, name=ranks)
        for ranks in ("1", "1", "2")
    ]
    for metric in ("energy_mae", "forces_mae", "forces_cosine_similarity"):
        one, again, two = (logged(output, metric) for output in said)
        assert one == again
        assert two == pytest.approx(one, abs=2e-4)
