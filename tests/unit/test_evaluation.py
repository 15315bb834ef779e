"""Scores of a checkpoint: metrics by hand, agreement with fairchem's validation, units, the paper's rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Data

from fairchem_dens import inference
from fairchem_dens.data.lmdb import LmdbWriter, data_from_atoms
from fairchem_dens.evaluation import is2re, metrics, paper, parity_plot, report, s2ef
from fairchem_dens.evaluation.sample import Pairs
from fairchem_dens.evaluation.scorecard import Score, Scorecard
from fairchem_dens.evaluation.splits import Split, find_splits

Settings = dict[str, Any]


def split_of(path: Path, **changes: Any) -> Split:
    return Split(**({"name": "val", "path": path, "source": str(path)} | changes))


@pytest.fixture
def run(run_settings: Settings, make_trainer: Callable[..., Any]) -> Any:
    """A trainer whose moving average differs from its weights, and so do energies from zero."""
    run_settings["evaluation_metrics"]["metrics"]["forces"].append(metrics.EFWT)
    run_settings["evaluation_metrics"]["metrics"]["forces"].append("magnitude_error")
    trainer = make_trainer(run_settings)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    trainer.ema.update()
    return trainer


@pytest.fixture
def checkpoint(run: Any) -> Path:
    return Path(run.save())


# ------------------------------------------------------------------ metrics


def hand_made() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Structures of 2, 1 and 1 atoms; only the first is within both thresholds."""
    energies = np.array([1.019, -2.0, 3.0])
    true_energies = np.array([1.0, -2.0, 3.021])
    true_forces = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    forces = true_forces.copy()
    forces[1, 0] += 0.029
    forces[2] = [0.031, 0.0, 1.0]
    return energies, true_energies, forces, true_forces, np.array([2, 1, 1])


def test_metrics_by_hand() -> None:
    sums = metrics.S2EFMetrics()
    sums.add(*hand_made())
    found = sums.means()
    assert tuple(found) == metrics.S2EF
    assert found[metrics.ENERGY_MAE] == pytest.approx((0.019 + 0.021) / 3)
    assert found[metrics.FORCES_MAE] == pytest.approx((0.029 + 0.031) / 12)
    cosines = [1.0, 2.0 / np.hypot(2.0, 0.029), 1.0 / np.hypot(1.0, 0.031), 1.0]
    assert found[metrics.FORCES_COSINE] == pytest.approx(np.mean(cosines), rel=1e-6)
    assert found[metrics.EFWT] == pytest.approx(1 / 3)


def test_metrics_do_not_depend_on_how_structures_are_grouped() -> None:
    energies, true_energies, forces, true_forces, natoms = hand_made()
    whole, parts = metrics.S2EFMetrics(), metrics.S2EFMetrics()
    whole.add(energies, true_energies, forces, true_forces, natoms)
    parts.add(energies[:1], true_energies[:1], forces[:2], true_forces[:2], natoms[:1])
    parts.add(energies[1:], true_energies[1:], forces[2:], true_forces[2:], natoms[1:])
    assert parts.means() == pytest.approx(whole.means(), rel=1e-12)


def test_is2re_by_hand() -> None:
    found = metrics.is2re(np.array([0.0, 1.0, 2.0]), np.array([0.019, 1.021, 2.0]))
    assert found == {metrics.ENERGY_MAE: pytest.approx(0.04 / 3), metrics.EWT: pytest.approx(2 / 3)}


# ------------------------------------------------------------------ agreement with fairchem


@pytest.fixture
def close_labels(
    run: Any, checkpoint: Path, lmdb_folders: dict[str, Path], tmp_path: Path
) -> tuple[Path, dict[str, float]]:
    """Labels that are the predictions and small noise, and what the metrics must be; a batch is left over.

    The last structures have one atom; the very last's is fixed, so that it counts in nothing.
    """
    rng = np.random.default_rng(0)
    structures = []
    for folder in (lmdb_folders["val"], lmdb_folders["test"]):
        structures += [run.val_dataset.dataset.__class__({"src": str(folder)})[index] for index in range(6)]
    for sid in (900, 901):
        atom = data_from_atoms(molecule("H"), sid=sid, fid=0, energy=0.0, forces=np.zeros((1, 3)))
        atom.cell = 9.0 * torch.eye(3)[None]
        structures.append(atom)
    structures[-1].fixed[:] = 1
    unlabelled = tmp_path / "unlabelled"
    with LmdbWriter(unlabelled) as writer:
        for data in structures:
            data.pop("id", None)
            writer.add(data)
    trainer = inference.trainer_of(checkpoint)
    predicted = list(inference.predictions(trainer, unlabelled, progress=""))
    errors: dict[str, list[Any]] = {"energy": [], "forces": [], "within": []}
    folder = tmp_path / "labelled"
    with LmdbWriter(folder) as writer:
        for number, (data, prediction) in enumerate(zip(structures, predicted, strict=True)):
            assert prediction.id == f"{data.sid}_{data.fid}"
            energy = rng.uniform(0.001, 0.015) * rng.choice([-1, 1])
            forces = rng.uniform(-0.02, 0.02, size=prediction.forces.shape)
            if number % 3 == 1:
                energy += 0.03
            if number % 4 == 2:
                forces[-1, 0] = 0.05
            data.energy = prediction.energy + energy
            data.forces = torch.tensor(prediction.forces + forces, dtype=torch.float32)
            writer.add(data)
            if not prediction.fixed.all():
                errors["energy"].append(abs(energy))
                errors["forces"].append(np.abs(forces[~prediction.fixed]).ravel())
                errors["within"].append(number % 3 != 1 and number % 4 != 2)
    expected = {
        metrics.ENERGY_MAE: float(np.mean(errors["energy"])),
        metrics.FORCES_MAE: float(np.concatenate(errors["forces"]).mean()),
        metrics.EFWT: float(np.mean(errors["within"])),
    }
    return folder, expected


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_agrees_with_validation_and_with_known_errors(
    run: Any, checkpoint: Path, close_labels: tuple[Path, dict[str, float]], batch_size: int | None
) -> None:
    folder, expected = close_labels
    trainer = inference.trainer_of(checkpoint, batch_size=batch_size)
    score = s2ef.score(trainer, split_of(folder))
    assert (score.structures, score.left_out) == (13, 1)
    for name, value in expected.items():
        assert score.metrics[name] == pytest.approx(value, rel=2e-4), name
    assert 0 < score.metrics[metrics.EFWT] < 1

    run.config["val_dataset"] = {"src": str(folder)}
    run.load_datasets()
    validated = run.validate(split="val", disable_tqdm=True)
    for name in metrics.S2EF:
        assert score.metrics[name] == pytest.approx(validated[name]["metric"], rel=2e-5), name


def test_two_evaluations_are_the_same_bit_for_bit(checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    cards = []
    for _ in range(2):
        torch.rand(3)
        score = s2ef.score(inference.trainer_of(checkpoint), split_of(lmdb_folders["val"]))
        cards.append(json.dumps([score.metrics, score.energies.tolist(), score.forces.tolist()]))
    assert cards[0] == cards[1]


# ------------------------------------------------------------------ running a checkpoint


def test_weights_are_the_moving_average(run: Any, checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    def first(trainer: Any) -> float:
        return next(inference.predictions(trainer, lmdb_folders["val"], progress="")).energy

    averaged = first(inference.trainer_of(checkpoint))
    stored = torch.load(checkpoint, weights_only=True)
    own = {**stored, "ema": None}
    torch.save(own, checkpoint)
    assert abs(first(inference.trainer_of(checkpoint)) - averaged) > 1e-3
    run.ema.copy_to()
    torch.save({**own, "state_dict": run.model.state_dict()}, checkpoint)
    assert first(inference.trainer_of(checkpoint)) == averaged


def test_nothing_is_written(
    checkpoint: Path, lmdb_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    trainer = inference.trainer_of(checkpoint)
    assert len(list(inference.predictions(trainer, lmdb_folders["val"], progress=""))) == 6
    assert not list(empty.rglob("*"))


def test_all_structures_in_the_order_of_the_data(
    run: Any, run_settings: Settings, make_trainer: Callable[..., Any], lmdb_folders: dict[str, Path]
) -> None:
    """What the run chose among its own training data says nothing about other data."""
    metadata = lmdb_folders["train"] / "metadata.npz"
    train = run_settings["dataset"]["train"] | {"first_n": 3, "metadata_path": str(metadata)}
    run_settings["dataset"] = {"train": train}
    checkpoint = make_trainer(run_settings).save()
    trainer = inference.trainer_of(checkpoint, num_workers=1)
    predicted = list(inference.predictions(trainer, lmdb_folders["test"], progress=""))
    assert [prediction.id for prediction in predicted] == [f"{sid}_0" for sid in range(200, 206)]
    for prediction, data in zip(predicted, trainer.test_dataset.dataset, strict=False):
        assert prediction.natoms == data.natoms
        assert prediction.true_energy == pytest.approx(data.energy)
        assert np.array_equal(prediction.true_forces, data.forces.numpy())
        assert np.array_equal(prediction.fixed, data.fixed.numpy() == 1)


def test_splits_of_the_run_as_the_run_reads_them(
    run_settings: Settings, make_trainer: Callable[..., Any], lmdb_folders: dict[str, Path]
) -> None:
    run_settings["dataset"]["val"]["first_n"] = 2
    checkpoint = make_trainer(run_settings).save()
    splits = inference.splits_of(checkpoint)
    assert set(splits) == {"val", "test"}
    trainer = inference.trainer_of(checkpoint)
    assert len(list(inference.predictions(trainer, splits["val"], progress=""))) == 2
    assert len(list(inference.predictions(trainer, splits["test"], progress=""))) == 6


def test_loaders_of_given_splits(checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    trainer = inference.trainer_of(
        checkpoint, dataset={"test": {"src": str(lmdb_folders["test"])}}, batch_size=4
    )
    assert trainer.val_loader is None
    predicted = trainer.predict(trainer.test_loader, disable_tqdm=True)
    assert predicted["ids"] == [f"{sid}_0" for sid in range(200, 206)]


def test_the_files_of_normalisers_are_not_needed_again(
    run: Any,
    run_settings: Settings,
    make_trainer: Callable[..., Any],
    lmdb_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    file = tmp_path / "normalizer.npz"
    np.savez(file, mean=0.3, rmsd=2.0)
    transforms = run_settings["dataset"]["train"]["transforms"]
    transforms["normalizer"]["energy"] = {"file": str(file)}
    checkpoint = make_trainer(run_settings).save()
    file.unlink()
    trainer = inference.trainer_of(checkpoint)
    assert trainer.normalizers["energy"].rmsd.item() == 2.0
    assert len(list(inference.predictions(trainer, lmdb_folders["val"], progress=""))) == 6


@pytest.mark.parametrize("model", ["fairchem_dens.models.EquiformerV2DeNS", "equiformer_v2"])
def test_baselines_and_references_of_elements(
    run_settings: Settings,
    make_trainer: Callable[..., Any],
    lmdb_folders: dict[str, Path],
    tmp_path: Path,
    model: str,
) -> None:
    """A model without DeNS, ours or fairchem's own; the references are those in the checkpoint."""
    file = tmp_path / "references.npz"
    np.savez(file, coeff=np.linspace(-1.0, 1.0, 100))
    transforms = run_settings["dataset"]["train"]["transforms"]
    del transforms["dens"]
    transforms["element_references"] = {"energy": {"file": str(file)}}
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    run_settings["model"]["name"] = model
    run = make_trainer(run_settings)
    validated = run.validate(split="val", disable_tqdm=True)
    checkpoint = run.save()
    file.unlink()
    score = s2ef.score(inference.trainer_of(checkpoint), split_of(lmdb_folders["val"]))
    assert validated[metrics.ENERGY_MAE]["metric"] > 2.0  # eV; without the references 0.9
    for name in (metrics.ENERGY_MAE, metrics.FORCES_MAE):
        assert score.metrics[name] == pytest.approx(validated[name]["metric"], rel=1e-5)


def test_positions_in_place_of_those_of_the_data(checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    trainer = inference.trainer_of(checkpoint)
    source = lmdb_folders["val"]
    inference.loader_of(trainer, source)
    own = {str(data.sid): data.pos.numpy() for data in trainer.test_dataset}
    before = list(inference.predictions(trainer, source, progress=""))
    same = list(inference.predictions(trainer, source, progress="", positions=own))
    assert [prediction.energy for prediction in same] == [prediction.energy for prediction in before]
    moved = own | {"103": own["103"] + np.linspace(0, 0.5, own["103"].size).reshape(-1, 3)}
    after = list(inference.predictions(trainer, source, progress="", positions=moved))
    different = [a.sid for a, b in zip(after, before, strict=True) if abs(a.energy - b.energy) > 1e-4]
    assert different == ["103"]
    with pytest.raises(ValueError, match="no positions for the structure with sid 100"):
        list(inference.predictions(trainer, source, progress="", positions={}))
    with pytest.raises(ValueError, match=r"sid 100 are of shape \(2, 3\)"):
        list(inference.predictions(trainer, source, progress="", positions={"100": np.zeros((2, 3))}))


def test_forces_from_gradients(
    run_settings: Settings, make_trainer: Callable[..., Any], write_lmdb: Callable[..., Path], tmp_path: Path
) -> None:
    """The paper's model for molecules differentiates its energy; a lone atom has no force."""
    run_settings["model"] = {
        "name": "fairchem_dens.models.EquiformerDeNS",
        "irreps_node_embedding": "8x0e+4x1e",
        "irreps_pre_attn": "8x0e+4x1e",
        "irreps_feature": "12x0e+6x1e",
        "irreps_head": "4x0e+2x1e",
        "irreps_mlp_mid": "8x0e+4x1e",
        "irreps_sh": "1x0e+1x1e",
        "irreps_equivariant_inputs": "1x0e+1x1e",
        "num_heads": 2,
        "num_layers": 1,
        "number_of_basis": 8,
        "fc_neurons": [8],
    }
    rng = np.random.default_rng(0)
    structures = []
    for sid, name in enumerate(["CH3CH2OH", "H2O", "H", "CH4", "NH3"]):
        atoms = molecule(name)
        forces = rng.normal(size=(len(atoms), 3))
        structures.append(data_from_atoms(atoms, sid=sid, fid=0, energy=float(sid), forces=forces))
    folder = write_lmdb(tmp_path / "molecules", structures)
    trainer = make_trainer(run_settings)
    checkpoint = trainer.save()
    trainer = inference.trainer_of(checkpoint, batch_size=3)
    predicted = list(inference.predictions(trainer, folder, progress=""))
    for prediction in predicted:
        assert np.abs(prediction.forces.sum(axis=0)).max() < 1e-5  # translations change no energy
        assert prediction.forces.any() == (prediction.natoms > 1)
    score = s2ef.score(trainer, split_of(folder))
    errors = [prediction.forces - prediction.true_forces for prediction in predicted]
    assert score.metrics[metrics.FORCES_MAE] == pytest.approx(np.abs(np.concatenate(errors)).mean(), rel=1e-6)


# ------------------------------------------------------------------ bad input


def without(folder: Path, source: Path, *fields: str) -> Path:
    with LmdbWriter(folder, labels=False) as writer:
        from fairchem_dens.data.lmdb import read_lmdb

        for data in read_lmdb(source):
            for name in fields:
                del data[name]
            writer.add(data)
    return folder


@pytest.mark.parametrize("field", ["energy", "forces"])
def test_data_without_labels(
    checkpoint: Path, lmdb_folders: dict[str, Path], tmp_path: Path, field: str
) -> None:
    folder = without(tmp_path / "bare", lmdb_folders["val"], field)
    trainer = inference.trainer_of(checkpoint)
    assert len(list(inference.predictions(trainer, folder, progress=""))) == 6
    with pytest.raises(ValueError, match=f"split 'val' .* has no labels '{field}'.*atomic_numbers"):
        s2ef.score(trainer, split_of(folder))


def test_no_free_atom(
    checkpoint: Path, structure: Callable[..., Data], write_lmdb: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_lmdb(tmp_path / "fixed", [structure(seed, num_fixed=12) for seed in range(3)])
    with pytest.raises(ValueError, match="no structure with a free atom"):
        s2ef.score(inference.trainer_of(checkpoint), split_of(folder))


def test_predictions_that_are_not_finite(run: Any, checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    stored["normalizers"]["energy"]["rmsd"] = torch.tensor(float("nan"))
    torch.save(stored, checkpoint)
    with pytest.raises(ValueError, match="prediction for structure 100_0 of the split 'val' is not finite"):
        s2ef.score(inference.trainer_of(checkpoint), split_of(lmdb_folders["val"]))


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)

    def error(change: Callable[[dict[str, Any]], Any]) -> str:
        changed = torch.load(checkpoint, weights_only=True)
        change(changed)
        file = tmp_path / "changed.pt"
        torch.save(changed, file)
        with pytest.raises(ValueError, match=r"changed\.pt|model") as caught:
            inference.trainer_of(file)
        return str(caught.value)

    assert "newer" in error(lambda c: c["config"]["fairchem_dens"].update(checkpoint_version=99))
    assert "checkpoint import" in error(lambda c: c["config"].update(model="equiformer_v2_dens"))
    assert "'config.outputs'" in error(lambda c: c["config"].pop("outputs"))
    assert "lmax_list" in error(lambda c: c["config"]["model"].update(lmax_list=[3]))
    assert "not a model" in error(lambda c: c["config"]["model"].update(name="no_such_model"))
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"truncated\.pt"):
        inference.trainer_of(truncated)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        inference.trainer_of(tmp_path / "none.pt")
    assert stored["config"]["model"]["lmax_list"] == [2]


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"num_workers": -1}])
def test_impossible_settings(checkpoint: Path, setting: dict[str, int]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"'{name}' must be at least"):
        inference.trainer_of(checkpoint, **setting)


# ------------------------------------------------------------------ splits and units


def test_splits_by_name_and_path(checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    splits = find_splits(["test", f"mine={lmdb_folders['val']}"], checkpoint=checkpoint)
    assert [split.name for split in splits] == ["test", "mine"]
    assert [split.path for split in splits] == [lmdb_folders["test"], lmdb_folders["val"]]
    assert [split.unit for split in splits] == ["eV", "eV"]
    assert {split.molecule for split in splits} == {None}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["nothing"], "run had 'val', 'test' of its own"),
        (["=x"], "must be NAME=PATH"),
        (["x="], "must be NAME=PATH"),
        (["a={val}", "a={val}"], "names 'a' twice"),
        ([], "names no data"),
    ],
)
def test_bad_splits(checkpoint: Path, lmdb_folders: dict[str, Path], asked: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_splits([text.format(val=lmdb_folders["val"]) for text in asked], checkpoint=checkpoint)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'val_id' is .*does not exist"):
        find_splits([f"val_id={tmp_path / 'no'}"])


def test_unit_and_molecule_of_md17(tmp_path: Path) -> None:
    folder = tmp_path / "aspirin" / "test"
    folder.mkdir(parents=True)
    file = folder / "data.0000.lmdb"
    file.touch()
    summary = {"molecule": "aspirin", "labels": "original", "units": {"energy": "kcal/mol"}}
    (tmp_path / "aspirin" / "summary.json").write_text(json.dumps(summary))
    for path in (folder, file):
        (split,) = find_splits([f"test={path}"])
        assert split.molecule == "aspirin"
        assert split.in_ev == pytest.approx(0.0433641, rel=1e-6)  # 1 kcal/mol
    assert find_splits([f"test={folder}"], unit="eV")[0].in_ev == 1.0
    (tmp_path / "aspirin" / "summary.json").write_text(json.dumps({**summary, "labels": "revised"}))
    assert find_splits([f"test={folder}"])[0].molecule is None  # the paper's rows are for the original labels
    (tmp_path / "aspirin" / "summary.json").write_text(json.dumps({"units": {"energy": "Hartree"}}))
    with pytest.raises(ValueError, match="'Hartree', which is none of eV, kcal/mol"):
        find_splits([f"test={folder}"])


def test_labels_in_kcal_per_mol(checkpoint: Path, lmdb_folders: dict[str, Path]) -> None:
    trainer = inference.trainer_of(checkpoint)
    in_ev = s2ef.score(trainer, split_of(lmdb_folders["val"]))
    in_kcal = s2ef.score(trainer, split_of(lmdb_folders["val"], unit="kcal/mol"))
    for name in (metrics.ENERGY_MAE, metrics.FORCES_MAE):
        assert in_kcal.metrics[name] == pytest.approx(0.0433641 * in_ev.metrics[name], rel=1e-5)
    assert in_kcal.metrics[metrics.FORCES_COSINE] == pytest.approx(
        in_ev.metrics[metrics.FORCES_COSINE], rel=1e-4
    )


# ------------------------------------------------------------------ the paper


def test_numbers_of_the_paper() -> None:
    def pairs(group: str, split: str) -> list[tuple[float, float | None]]:
        return [(row.energy_mae, row.forces_mae) for row in paper.rows_of([group]) if row.split == split]

    assert pairs("oc20-2M-12ep", "OC20 val") == [(285, 20.46), (269, 19.09)]
    assert pairs("oc20-all-md", "OC20 test") == [(219, 14.2), (214, 13.3)]
    assert pairs("oc22", "OC22 val OOD") == [(629, 30.70), (533.0, 27.11)]
    assert pairs("oc20-is2re", "OC20 IS2RE test") == [(309, None), (293, None)]
    assert [row.within_threshold for row in paper.rows_of(["oc20-is2re"])] == [None, 0.1878]
    aspirin = {row.model: (row.energy_mae, row.forces_mae) for row in paper.rows_of(["md17-aspirin"])}
    assert aspirin == {
        "Equiformer, L 2": (5.3, 7.2),
        "Equiformer, L 2 + DeNS": (5.1, 5.7),
        "Equiformer, L 3": (5.3, 6.6),
        "Equiformer, L 3 + DeNS": (5.0, 5.2),
    }
    assert len(paper.rows_of(paper.GROUPS)) == len(paper.ROWS) == 22 + 32


def test_rows_that_splits_are_comparable_with() -> None:
    def groups(names: list[str], molecule_name: str | None = None, *, relaxed: bool = False) -> set[str]:
        rows = paper.comparable(names, [molecule_name] * len(names), relaxed=relaxed)
        return {f"{row.group} {row.split}" for row in rows}

    oc20 = ["id", "ood_ads", "ood_cat", "ood_both"]
    assert groups(oc20) == groups([f"val_{name}" for name in oc20])
    assert groups(oc20) == {f"{group} OC20 val" for group in ("oc20-2M-12ep", "oc20-2M-30ep", "oc20-all-md")}
    assert groups(oc20, relaxed=True) == {"oc20-is2re OC20 IS2RE test"}
    assert groups(["id", "ood"]) == {"oc22 OC22 val ID", "oc22 OC22 val OOD"}
    assert groups(oc20[:3]) == groups(["mine"]) == set()
    assert groups(["test"], "uracil") == {"md17-uracil MD17 uracil test"}
    assert groups(["test"], "azobenzene") == set()  # of MD17, but not in the paper
    with pytest.raises(ValueError, match=r"'--paper md17-asprin' .*did you mean 'md17-aspirin'"):
        paper.rows_of(["md17-asprin"])


# ------------------------------------------------------------------ what comes out


def a_score(name: str, energy: float, forces: float) -> Score:
    values = {
        metrics.ENERGY_MAE: energy,
        metrics.FORCES_MAE: forces,
        metrics.FORCES_COSINE: 0.5,
        metrics.EFWT: 0.25,
    }
    points = np.array([[0.0, 0.1], [1.0, 0.9]])
    return Score(
        split=Split(name=name, path=Path(name), source=name), metrics=values, structures=7, free_atoms=20,
        energies=points, forces=points,
    )  # fmt: skip


def a_card(*scores: Score, **changes: Any) -> Scorecard:
    scored = {score.split.name: "checkpoint.pt" for score in scores}
    return Scorecard(**({"scored": scored, "metrics": metrics.S2EF, "scores": scores} | changes))


def test_table() -> None:
    card = a_card(a_score("id", 0.2, 0.01), a_score("ood", 0.4, 0.02), paper=paper.rows_of(["oc20-2M-12ep"]))
    lines = report.table(card).splitlines()
    assert lines[0].split("  ")[0] == "split"
    assert "energy MAE meV" in lines[0] and "force MAE meV/Å" in lines[0] and "EFwT %" in lines[0]
    assert lines[2].split() == ["id", "7", "200.0", "10.00", "0.5000", "25.00"]
    assert lines[4].split() == ["mean", "of", "2", "300.0", "15.00", "0.5000", "25.00"]
    dens = next(line for line in lines if line.startswith("OC20 val") and "DeNS" in line)
    assert dens.split()[-4:] == ["269", "19.09", "–", "–"]
    # The paper's number stands below one's own.
    assert dens.index("19.09") + 5 == lines[4].index("15.00") + 5 == lines[0].index("MAE meV/Å") + 9


def test_one_split_has_no_mean() -> None:
    card = a_card(a_score("id", 0.2, 0.01))
    assert card.mean() is None and "mean" not in report.table(card)
    assert report.as_data(card)["mean"] is None


def test_data_of_a_scorecard() -> None:
    card = a_card(a_score("id", 0.2, 0.01), a_score("ood", 0.4, 0.02), paper=paper.rows_of(["oc20-2M-12ep"]))
    data = json.loads(json.dumps(report.as_data(card)))
    assert data["units"][metrics.ENERGY_MAE] == "meV"
    assert data["splits"]["ood"] == {
        "scored": "checkpoint.pt", "data": "ood", "unit_of_data": "eV", "structures": 7,
        "structures_without_free_atoms": 0, "free_atoms": 20, metrics.ENERGY_MAE: 400.0,
        metrics.FORCES_MAE: 20.0, metrics.FORCES_COSINE: 0.5, metrics.EFWT: 0.25,
    }  # fmt: skip
    assert data["mean"][metrics.FORCES_MAE] == pytest.approx(15.0)
    assert data["paper"]["rows"][1] == {
        "split": "OC20 val", "model": "EquiformerV2, 2M, 12 epochs + DeNS",
        metrics.ENERGY_MAE: 269, metrics.FORCES_MAE: 19.09,
    }  # fmt: skip


def test_notes() -> None:
    score = a_score("test", 0.2, 0.01)
    kcal = Score(
        **(
            vars(score)
            | {"split": Split(name="test", path=Path(), source="", unit="kcal/mol"), "left_out": 2}
        )
    )
    text = report.table(a_card(kcal))
    assert "test: labels in kcal/mol, here in meV" in text
    assert "test: structures left out for having no free atom: 2" in text


def test_sample_is_bounded_and_even() -> None:
    pairs = Pairs(limit=50)
    for start in range(0, 1000, 7):
        values = np.arange(start, min(start + 7, 1000), dtype=float)
        pairs.add(values, values + 0.5)
    kept = pairs.values()
    assert 50 < len(kept) <= 100
    steps = np.diff(kept[:, 0])
    assert (steps == steps[0]).all() and kept[0, 0] == 0
    assert (kept[:, 1] - kept[:, 0] == 0.5).all()
    few = Pairs()
    few.add(np.ones((4, 3)), np.zeros((4, 3)))
    assert few.values().tolist() == [[1.0, 0.0]] * 12


def size_of(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    start = file.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = np.frombuffer(start[16:], dtype=">u4")
    return int(width), int(height)


def test_parity_plot(tmp_path: Path) -> None:
    """A column for each split, two rows with forces; one point, few and many."""
    rng = np.random.default_rng(0)
    counts = {"one": 1, "few": 10, "many": 20_000}
    scores = {
        name: Score(**(vars(a_score(name, 0.2, 0.01)) | {"energies": rng.normal(size=(count, 2))}))
        for name, count in counts.items()
    }
    parity_plot.draw(tmp_path / "three.png", a_card(*scores.values()))
    parity_plot.draw(tmp_path / "bare.png", a_card(Score(**(vars(scores["few"]) | {"forces": None}))))
    three, bare = size_of(tmp_path / "three.png"), size_of(tmp_path / "bare.png")
    assert three[0] > 2 * bare[0] and three[1] > 1.5 * bare[1]


# ------------------------------------------------------------------ relaxations


@pytest.fixture
def relaxed(structure: Callable[..., Data], tmp_path: Path) -> Split:
    """Initial structures 0 to 3 with the energies of the relaxed ones: 0, 1, 2, 3 eV."""
    folder = tmp_path / "is2re"
    with LmdbWriter(folder, labels=False) as writer:
        for sid in range(4):
            data = structure(sid)
            del data["energy"], data["forces"]
            data.y_relaxed = float(sid)
            writer.add(data)
    return split_of(folder)


def write_trajectory(folder: Path, sid: int | str, energy: float | None) -> None:
    folder.mkdir(exist_ok=True)
    frames = [molecule("H2O") for _ in range(3)]
    for number, atoms in enumerate(frames):
        if energy is not None:
            atoms.calc = SinglePointCalculator(atoms, energy=energy + 2 - number)
    ase.io.write(folder / f"{sid}.traj", frames)


def test_energies_of_trajectories(relaxed: Split, tmp_path: Path) -> None:
    folder = tmp_path / "trajectories"
    for sid, error in enumerate([0.01, -0.015, 0.1, 0.0]):
        write_trajectory(folder, sid, sid + error)
    write_trajectory(folder, "of_another_split", 7.0)
    energies = is2re.relaxed_energies(folder, relaxed)
    score = is2re.score(relaxed, energies, where=str(folder))
    assert score.structures == 4
    assert score.metrics == pytest.approx({metrics.ENERGY_MAE: 0.125 / 4, metrics.EWT: 0.75})
    table = report.table(a_card(score, metrics=metrics.IS2RE))
    assert table.splitlines()[2].split() == ["val", "4", "31.2", "75.00"]


def test_energies_of_an_npz(relaxed: Split, tmp_path: Path) -> None:
    file = tmp_path / "results.npz"
    np.savez(file, ids=np.array(["3", "2", "1", "0"]), energy=np.array([3.0, 2.0, 1.0, 0.4]))
    score = is2re.score(relaxed, is2re.relaxed_energies(file, relaxed), where=str(file))
    assert score.metrics == pytest.approx({metrics.ENERGY_MAE: 0.1, metrics.EWT: 0.75})


def test_energies_at_relaxed_positions(checkpoint: Path, relaxed: Split, tmp_path: Path) -> None:
    trainer = inference.trainer_of(checkpoint)
    inference.loader_of(trainer, relaxed.source)
    structures = [trainer.test_dataset[index] for index in range(4)]
    expected = {}
    moved = []
    for data in structures:
        moved.append(data.pos.numpy() + 0.1 * data.sid * np.cos(np.arange(36.0)).reshape(12, 3))
    for data, pos in zip(structures, moved, strict=True):
        changed = data.clone()
        changed.pos = torch.tensor(pos, dtype=torch.float32)
        (prediction,) = inference.predict_batch(trainer, trainer.collater([changed]))
        expected[str(data.sid)] = prediction.energy
    file = tmp_path / "relaxed_positions.npz"
    np.savez(file, ids=np.arange(4).astype(str), pos=np.concatenate(moved), chunk_idx=np.array([12, 24, 36]))
    found = is2re.relaxed_energies(file, relaxed, trainer)
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="no energies: give --checkpoint"):
        is2re.relaxed_energies(file, relaxed)


def test_bad_results_of_relaxations(relaxed: Split, tmp_path: Path, lmdb_folders: dict[str, Path]) -> None:
    def refused(match: str, results: Path, split: Split = relaxed) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            is2re.score(split, is2re.relaxed_energies(results, split), where=str(results))

    refused("no results of relaxations", tmp_path / "none")
    folder = tmp_path / "trajectories"
    folder.mkdir()
    refused(r"holds no trajectories", folder)
    for sid in range(3):
        write_trajectory(folder, sid, 0.0)
    refused("no relaxation of 1 of the 4 structures .* sid 3", folder)
    write_trajectory(folder, 3, None)
    refused(r"3\.traj' cannot be read as a trajectory with energies", folder)
    (folder / "3.traj").write_bytes(b"- of Ulm")
    refused(r"3\.traj' cannot be read as a trajectory with energies", folder)
    write_trajectory(folder, 3, float("nan"))
    refused("sid 3 in .* is not finite", folder)
    write_trajectory(folder, 3, 3.0)
    refused("no labels 'y_relaxed'", folder, split_of(lmdb_folders["val"]))
    file = tmp_path / "results.npz"
    np.savez(file, ids=np.array(["1", "1"]), energy=np.zeros(2))
    refused("several results for one sid", file)
    np.savez(file, energies=np.zeros(2))
    refused("has the arrays energies", file)
    file.write_bytes(b"PK but no archive")
    refused("is not an npz file", file)
