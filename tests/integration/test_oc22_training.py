"""Total energies with element references through the real `fairchem` command: they come back total, in eV."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from torch_geometric.data import Data

from fairchem_dens.cli.main import main
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.data.references import padded, read_references

REFERENCES = {1: -3.4, 8: -6.7, 29: -2.7, 46: -3.4}
"""eV, of the elements in the tests' structures."""


def as_oc22(folder: Path, structures: Iterable[Data]) -> tuple[str, dict[str, float]]:
    """Writes structures with total energies as OC22 has them; returns the folder and energies by id."""
    folder.mkdir()
    energies = {}
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**26, lock=False)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(structures):
            total = sum(REFERENCES[int(number)] for number in data.atomic_numbers)
            record = data.clone().update({"y": total + 0.1 * data.energy, "force": data.forces})
            del record.energy, record.forces
            record.oc22, record.nads = 1, 1
            transaction.put(str(index).encode(), pickle.dumps(record, protocol=-1))
            energies[f"{data.sid}_{data.fid}"] = record.y
    env.close()
    return str(folder), energies


def test_synthetic_total_energies(
    tmp_path: Path, run_settings: dict[str, Any], structure: Callable[..., Data], fairchem: Any
) -> None:
    train, _ = as_oc22(tmp_path / "train", [structure(seed, natoms=6 + seed % 6) for seed in range(8)])
    test, totals = as_oc22(
        tmp_path / "test", [structure(seed, natoms=6 + seed % 6) for seed in range(50, 54)]
    )
    coefficients = np.zeros(100)
    for number, value in REFERENCES.items():
        coefficients[number] = value
    coefficients[15] = 1e11
    np.savez(tmp_path / "linfit.npz", coeff=coefficients)
    run_settings["dataset"]["train"] |= {
        "format": "oc22_lmdb",
        "src": train,
        "key_mapping": {"y": "energy", "force": "forces"},
        "lin_ref": str(tmp_path / "linfit.npz"),
    }
    run_settings["dataset"]["val"]["src"] = run_settings["dataset"]["test"]["src"] = test
    normalizer = run_settings["dataset"]["train"]["transforms"]["normalizer"]
    normalizer["energy"] = {"mean": 0.0, "rmsd": 0.1}
    run_settings["task"] = {"prediction_dtype": "float32"}
    run_settings["optim"] |= {"max_epochs": 1, "eval_every": 2}

    output = fairchem("train", run_settings)
    assert "step: 2.00e+00" in output
    # On the total energy, of which a model without the references would miss some 30 eV.
    (mae,) = re.findall(r"energy_mae: (\S+?),", output.split("Evaluating on val.")[1])
    assert float(mae) < 1.0
    fairchem("predict", run_settings, "--checkpoint", str(fairchem.file()))
    found = fairchem.results()
    assert found["energy"].dtype == np.float32 and found["forces"].dtype == np.float32
    expected = np.array([totals[str(name)] for name in found["ids"]])
    assert len(expected) == 4 and expected.std() > 1.0 and np.abs(expected).min() > 15
    assert np.abs(found["energy"].reshape(-1) - expected).mean() == pytest.approx(float(mae), rel=0.02)


@pytest.mark.slow
def test_real_oxides(
    tmp_path: Path, run_settings: dict[str, Any], real_data: Callable[[str], Path], fairchem: Any
) -> None:
    """Bulk oxides with total energies, measured from the references of OC22, which were fitted to slabs."""
    database, references = real_data("oc22/oxides.db"), real_data("linref/oc22_linfit_coeffs.npz")
    data = tmp_path / "data"
    assert (
        main(["data", "from-ase", str(database), "--energy", "total", "--val", "0.15", "--out", str(data)])
        == 0
    )
    folders = {split: str(data / split) for split in ("train", "val")}
    assert main(["data", "check", *folders.values()]) == 0
    converted = tmp_path / "references.npz"
    arguments = [str(references), "--data", folders["train"], "--out", str(converted)]
    assert main(["data", "references", *arguments]) == 0
    stats = tmp_path / "stats.yml"
    arguments = [folders["train"], "--references", str(converted), "--out", str(stats)]
    assert main(["data", "fit-stats", *arguments]) == 0

    dens = {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "switch": "batch"}
    run_settings["includes"] = [str(stats)]
    run_settings["dataset"] = {
        "train": {"transforms": {"dens": dens}},
        "val": {"src": folders["val"]},
        "test": {"src": folders["train"]},
    }
    run_settings["task"] = {"prediction_dtype": "float32"}
    run_settings["loss_functions"] = [
        {"energy": {"fn": "mae", "coefficient": 20}},
        {"forces": {"fn": "l2mae", "coefficient": 1}},
        {"noise": {"fn": "l2mae", "coefficient": 1}},
    ]
    channels = ("sphere_channels", "attn_hidden_channels", "ffn_hidden_channels")
    run_settings["model"] |= dict.fromkeys(channels, 16) | {"avg_num_nodes": 10.0}
    run_settings["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0}
    run_settings["optim"] |= {"max_epochs": 10, "lr_initial": 0.01, "eval_every": 650}
    output = fairchem("train", run_settings)
    training, validation = output.split("Evaluating on val.")
    losses = np.array([float(loss) for loss in re.findall(r"\bloss: (\S+?),", training)])
    assert len(losses) == 650
    assert losses[-50:].mean() < 0.6 * losses[:50].mean()
    (val_mae,) = re.findall(r"energy_mae: (\S+?),", validation)

    fairchem("predict", run_settings, "--checkpoint", str(fairchem.file()))
    found = fairchem.results()
    structures = {f"{s.sid}_{s.fid}": s for s in read_lmdb(folders["train"])}
    seen = [structures[str(name)] for name in found["ids"]]
    labels, energies = np.array([s.energy for s in seen]), found["energy"].reshape(-1).astype(float)
    coefficients = padded(read_references(references))
    constants = np.array([coefficients[s.atomic_numbers.numpy()].sum() for s in seen])
    mae = np.abs(energies - labels).mean()
    by_references = np.abs(constants + (labels - constants).mean() - labels).mean()
    val_labels = np.array([s.energy for s in read_lmdb(folders["val"])])
    print(
        f"{len(losses)} steps, loss {losses[:50].mean():.2f} → {losses[-50:].mean():.2f}; total energies of "
        f"{len(labels)} train oxides from {labels.min():.1f} to {labels.max():.1f} eV: MAE {mae:.2f} eV, "
        f"{by_references:.2f} by references and a constant, {np.abs(labels - labels.mean()).mean():.2f} by a "
        f"constant; val, other formulas: {float(val_mae):.2f} eV, std of its labels {val_labels.std():.1f}"
    )
    assert mae < 0.5 * by_references
    assert np.corrcoef(energies, labels)[0, 1] > 0.995
    assert float(val_mae) < 0.25 * val_labels.std(), "formulas of which there is none in train"
