"""What is on record about labels, and splits that do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import molecule

from fairchem_dens.cli.main import main
from fairchem_dens.data.labels import Labelling, check_labels_agree, labels_of
from fairchem_dens.data.md17 import make_md17

FRAMES = 40


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Path]:
    """MD17 folders of one molecule, with the original and with the revised labels."""
    ethanol = molecule("CH3CH2OH")
    rng = np.random.default_rng(0)
    shape = (FRAMES, len(ethanol), 3)
    energies, forces = rng.normal(scale=4.0, size=FRAMES) - 97_000.0, rng.normal(scale=30.0, size=shape)
    np.savez(
        tmp_path / "ethanol.npz",
        nuclear_charges=ethanol.numbers,
        coords=ethanol.positions + rng.normal(scale=0.05, size=shape),
        energies=energies + 300.0,
        forces=forces + rng.normal(size=shape),
        old_indices=np.arange(FRAMES),
        old_energies=energies,
        old_forces=forces,
    )
    folders = {labels: tmp_path / labels for labels in ("original", "revised")}
    for labels, folder in folders.items():
        make_md17("ethanol", labels, folder, npz=tmp_path / "ethanol.npz", train_size=20, val_size=10)
    return folders


def test_found_from_folder_and_file(both: dict[str, Path]) -> None:
    folder = both["revised"] / "train"
    (file,) = folder.glob("*.lmdb")
    assert labels_of(folder) == labels_of(str(file)) == Labelling("kcal/mol", "revised", "ethanol")
    assert Labelling("kcal/mol").ev == pytest.approx(0.0433641, abs=1e-7)


@pytest.mark.parametrize("text", [None, "[1, 2]", "{not json", '{"units": 3}', "{}"])
def test_nothing_on_record(tmp_path: Path, text: str | None) -> None:
    """Or a file of that name that is somebody else's."""
    (tmp_path / "train").mkdir()
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert labels_of(tmp_path / "train") == Labelling()


def test_report_has_the_unit_of_the_data(
    both: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = both["original"] / "train"
    report = tmp_path / "report.json"
    assert main(["data", "check", str(train), "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert "energy, kcal/mol" in said and "forces, kcal/mol/Å" in said and "original" in said
    assert "50 eV/Å" not in said  # 30 kcal/mol/Å is no large force
    (data,) = json.loads(report.read_text())["sources"]
    assert data["labels"] == {"kind": "original", "unit": "kcal/mol"}
    out = tmp_path / "stats.yml"
    assert main(["data", "fit-stats", str(train), "--references", "none", "--out", str(out)]) == 0
    assert "(kcal/mol, kcal/mol/Å)" in out.read_text()


def test_mixed_labels_are_reported(both: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Less their constants, original and revised energies look alike."""
    assert main(["data", "check", str(both["original"] / "train"), str(both["revised"] / "val")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "labels are original in the first and revised in the second" in said


def test_mixed_labels_do_not_train(
    both: dict[str, Path], run_settings: dict[str, Any], make_trainer: Callable[..., Any]
) -> None:
    run_settings["dataset"]["train"]["src"] = str(both["original"] / "train")
    run_settings["dataset"]["val"] = {"src": str(both["revised"] / "val")}
    message = r"dataset\.train\.src.*original labels in kcal/mol.*dataset\.val\.src.*revised labels"
    with pytest.raises(ValueError, match=message):
        make_trainer(run_settings)


def test_splits_of_one_set_agree(both: dict[str, Path], tmp_path: Path) -> None:
    one = both["original"]
    elsewhere = tmp_path / "own" / "relax"
    elsewhere.mkdir(parents=True)
    check_labels_agree(
        {"train": {"src": str(one / "train")}, "val": {"src": str(one / "val")}, "test": {}}
        | {"relax": {"src": str(elsewhere)}}
    )
