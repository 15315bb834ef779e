"""`fairchem-dens evaluate` on runs of the `fairchem` command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.build import molecule

from fairchem_dens.cli.main import main
from fairchem_dens.data.lmdb import LmdbWriter, read_lmdb
from fairchem_dens.demo.results import read_curves
from fairchem_dens.evaluation import metrics
from model_cases import EQUIFORMER

KCAL_PER_MOL = 43.3641
"""meV."""
Settings = dict[str, Any]


@pytest.fixture
def settings(run_settings: Settings) -> Settings:
    """A short run that logs the metrics of the leaderboard."""
    run_settings["optim"]["max_epochs"] = 1
    run_settings["evaluation_metrics"]["metrics"]["forces"].append(metrics.EFWT)
    run_settings["evaluation_metrics"]["metrics"]["forces"].append("magnitude_error")
    return run_settings


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def scorecard(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scorecard.json").read_text())


def validated(fairchem: Any, settings: Settings, checkpoint: Path, name: str) -> dict[str, float]:
    """What ``fairchem --mode validate`` logs."""
    fairchem("validate", settings, "--checkpoint", str(checkpoint), name=name)
    curves = read_curves(fairchem.folder / "logs" / "tensorboard" / name)
    return {name: list(curves[f"val/{name}"].values())[-1] for name in metrics.S2EF}


@pytest.mark.slow
def test_agrees_with_the_fairchem_command(
    settings: Settings, fairchem: Any, lmdb_folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    fairchem("train", settings)
    checkpoint = fairchem.file()
    out = tmp_path / "scores"
    splits = ["val", f"unseen={lmdb_folders['test']}"]
    assert evaluate("--checkpoint", checkpoint, "--splits", *splits, "--out", out) == 0
    printed = capsys.readouterr().out
    assert (out / "scorecard.txt").read_text() in printed and f"wrote {out}" in printed
    found = scorecard(out)["splits"]
    expected = validated(fairchem, settings, checkpoint, "validation")
    for name in metrics.S2EF:
        factor = 1000.0 if name in (metrics.ENERGY_MAE, metrics.FORCES_MAE) else 1.0
        assert found["val"][name] == pytest.approx(factor * expected[name], rel=1e-5), name
        mean = (found["val"][name] + found["unseen"][name]) / 2
        assert scorecard(out)["mean"][name] == pytest.approx(mean, rel=1e-12)

    again = tmp_path / "again"
    assert evaluate("--checkpoint", checkpoint, "--splits", *splits, "--out", again) == 0
    for file in ("scorecard.txt", "scorecard.json", "parity.png"):
        assert (out / file).read_bytes() == (again / file).read_bytes(), file
    assert {file.name for file in out.iterdir()} == {"scorecard.txt", "scorecard.json", "parity.png"}


@pytest.mark.slow
def test_relaxations(
    settings: Settings, fairchem: Any, lmdb_folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """What `run-relaxations` writes is scored from its trajectories and from its positions alike."""
    labels = {}
    with LmdbWriter(tmp_path / "is2re", labels=False) as writer:
        for data in read_lmdb(lmdb_folders["val"]):
            del data["energy"], data["forces"], data["fid"]
            data.fid = 0
            labels[str(data.sid)] = data.y_relaxed = float(data.sid) / 100
            writer.add(data)
    settings["dataset"]["relax"] = {"src": str(tmp_path / "is2re")}
    trajectories = tmp_path / "trajectories"
    settings["task"] = {
        "relaxation_steps": 3,
        "relaxation_fmax": 0.001,
        "write_pos": True,
        "relax_opt": {"memory": 5, "maxstep": 0.04, "traj_dir": str(trajectories)},
    }
    fairchem("train", settings)
    fairchem("run-relaxations", settings, "--checkpoint", str(fairchem.file()), name="relaxed")
    out = tmp_path / "scores"
    data = f"id={tmp_path / 'is2re'}"
    assert evaluate("--splits", data, "--relaxed", f"id={trajectories}", "--out", out) == 0
    assert "EwT" in capsys.readouterr().out
    found = scorecard(out)["splits"]["id"]
    assert found["structures"] == 6 and metrics.FORCES_MAE not in found

    positions = fairchem.folder / "results" / "relaxed" / "relaxed_positions.npz"
    options = ["--splits", data, "--relaxed", f"id={positions}", "--out", tmp_path / "from_positions"]
    assert evaluate(*options) == 2
    assert "holds relaxed positions and no energies: give --checkpoint" in capsys.readouterr().err
    assert evaluate("--checkpoint", fairchem.file(), *options) == 0
    from_positions = scorecard(tmp_path / "from_positions")["splits"]["id"]
    assert from_positions[metrics.ENERGY_MAE] == pytest.approx(found[metrics.ENERGY_MAE], rel=1e-4)

    (trajectories / "103.traj").unlink()
    assert evaluate("--splits", data, "--relaxed", f"id={trajectories}") == 2
    assert "no relaxation of 1 of the 6 structures" in capsys.readouterr().err


def md17(file: Path, out: Path, *sizes: str) -> Path:
    command = ["data", "md17", "ethanol", "--labels", "original", "--npz", str(file), "--out", str(out)]
    assert main([*command, *sizes]) == 0
    return out


def equiformer(settings: Settings, data: Path) -> Settings:
    """The paper's model for molecules, very small, on a folder that `data md17` made."""
    settings["includes"] = [str(data / "data.yml")]
    settings["dataset"] = {
        "train": {"transforms": {"dens": {"prob": 0.25, "std": 0.05, "corrupt_ratio": 0.25}}},
        "val": {"src": str(data / "test")},
    }
    settings["model"] = {
        **EQUIFORMER,
        "name": "fairchem_dens.models.EquiformerDeNS",
        "num_layers": 1,
    }
    settings["task"] = {"prediction_dtype": "float32"}
    return settings


def check_md17(checkpoint: Path, data: Path, out: Path, validated: dict[str, float]) -> None:
    """The scorecard is that of validation, in meV, beside the paper's rows of the molecule."""
    assert evaluate("--checkpoint", checkpoint, "--splits", f"test={data / 'test'}", "--out", out) == 0
    card = scorecard(out)
    found = card["splits"]["test"]
    assert found["unit_of_data"] == "kcal/mol"
    for name in (metrics.ENERGY_MAE, metrics.FORCES_MAE):
        assert found[name] == pytest.approx(KCAL_PER_MOL * validated[name], rel=2e-5)
    rows = {row["model"]: (row["energy_mae"], row["forces_mae"]) for row in card["paper"]["rows"]}
    assert rows["Equiformer, L 2 + DeNS"] == (2.2, 2.6) and len(rows) == 4
    assert "labels in kcal/mol, here in meV" in (out / "scorecard.txt").read_text()


def test_molecules_in_the_units_of_the_paper(
    settings: Settings, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    atoms, rng = molecule("CH3CH2OH"), np.random.default_rng(0)
    shape = (19, len(atoms), 3)
    np.savez(
        tmp_path / "ethanol.npz",
        z=atoms.numbers,
        R=atoms.positions + rng.normal(scale=0.1, size=shape),
        E=-97_000.0 + rng.normal(scale=5.0, size=(19, 1)),
        F=rng.normal(scale=20.0, size=shape),
    )
    data = md17(tmp_path / "ethanol.npz", tmp_path / "set", "--train-size", "8", "--val-size", "4")
    settings = equiformer(settings, data)
    dataset = yaml.safe_load((data / "data.yml").read_text())["dataset"]
    dataset["train"]["transforms"] |= settings["dataset"]["train"]["transforms"]
    dataset["val"] = settings["dataset"]["val"]
    trainer = make_trainer({**settings, "dataset": dataset})
    expected = trainer.validate(split="val", disable_tqdm=True)
    means = {name: value["metric"] for name, value in expected.items()}
    check_md17(Path(trainer.save()), data, tmp_path / "scores", means)


@pytest.mark.slow
def test_molecules_of_md17(
    settings: Settings, fairchem: Any, tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    sizes = ("--train-size", "40", "--val-size", "5", "--test-size", "30")
    data = md17(real_data("rmd17/rmd17_ethanol.npz"), tmp_path / "set", *sizes)
    settings = equiformer(settings, data)
    fairchem("train", settings)
    expected = validated(fairchem, settings, fairchem.file(), "validation")
    check_md17(fairchem.file(), data, tmp_path / "scores", expected)


@pytest.fixture
def checkpoint(settings: Settings, make_trainer: Callable[..., Any]) -> Path:
    return Path(make_trainer(settings).save())


def test_rows_of_the_paper_are_found_or_chosen(
    checkpoint: Path, lmdb_folders: dict[str, Path], capsys: Any
) -> None:
    def rows(*options: str) -> list[str]:
        assert evaluate("--checkpoint", checkpoint, *options) == 0
        _, _, said = capsys.readouterr().out.partition("The paper")
        return [line for line in said.splitlines() if line.startswith(("OC2", "MD17"))]

    splits = [f"{name}={lmdb_folders['val']}" for name in ("id", "ood")]
    found = rows("--splits", *splits)
    assert [line.split(":")[0] for line in found] == ["OC22 val ID"] * 2 + ["OC22 val OOD"] * 2
    assert found[1].split()[-4:] == ["391.6", "20.66", "–", "–"]
    assert rows("--splits", *splits, "--paper", "none") == []
    assert len(rows("--paper", "oc20-2M-12ep", "md17-toluene")) == 6
    assert rows() == []


def test_existing_folders_are_replaced_only_on_request(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "scores"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert evaluate("--checkpoint", checkpoint, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err and (out / "mine.txt").exists()
    assert evaluate("--checkpoint", checkpoint, "--out", out, "--overwrite") == 0
    assert not (out / "mine.txt").exists() and scorecard(out)["splits"]["val"]["structures"] == 6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".scores")]


def test_errors_are_one_line(
    checkpoint: Path, lmdb_folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    def error(*arguments: object) -> str:
        assert evaluate(*arguments, "--out", tmp_path / "scores") == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "scores").exists()
        assert not list(tmp_path.glob(".scores*"))
        return said[-1]

    data = f"id={lmdb_folders['val']}"
    assert "Give '--checkpoint'" in error()
    assert "There is no checkpoint" in error("--checkpoint", tmp_path / "none.pt", "--splits", data)
    assert "does not exist" in error("--checkpoint", checkpoint, "--splits", f"id={tmp_path / 'no'}")
    assert "of its own" in error("--checkpoint", checkpoint, "--splits", "train")
    assert "is nothing that the paper reports" in error("--checkpoint", checkpoint, "--paper", "oc20")
    assert "'--unit' must be one of eV, kcal/mol" in error("--checkpoint", checkpoint, "--unit", "Ry")
    assert "must name the same" in error("--splits", data, "--relaxed", f"ood={tmp_path}")
    assert "must be NAME=RESULTS" in error("--splits", data, "--relaxed", str(tmp_path))
    assert "'batch_size' must be" in error("--checkpoint", checkpoint, "--batch-size", 0)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:20_000])
    assert "truncated.pt" in error("--checkpoint", truncated, "--splits", data)
    newer = torch.load(checkpoint, weights_only=True)
    newer["config"]["fairchem_dens"]["checkpoint_version"] = 1000
    torch.save(newer, tmp_path / "newer.pt")
    assert "install a newer fairchem_dens" in error("--checkpoint", tmp_path / "newer.pt", "--splits", data)
    with LmdbWriter(tmp_path / "bare", labels=False) as writer:
        for structure in read_lmdb(lmdb_folders["val"]):
            del structure["energy"]
            writer.add(structure)
    assert "has no labels 'energy'" in error(
        "--checkpoint", checkpoint, "--splits", f"id={tmp_path / 'bare'}"
    )


def test_what_is_printed_is_the_scorecard(checkpoint: Path, capsys: Any, caplog: Any) -> None:
    """Nothing of how fairchem trains, on a machine without a GPU."""
    caplog.clear()
    assert evaluate("--checkpoint", checkpoint) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("split")
    assert all("structure" in line for line in printed.err.replace("\r", "\n").splitlines() if line.strip())
    assert not caplog.records
