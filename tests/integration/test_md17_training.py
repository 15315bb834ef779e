"""From a file of MD17 to a trained model, through `fairchem-dens data md17` and `fairchem --mode train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase.build import molecule
from fairchem.core.common.utils import load_config

from fairchem_dens.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
Settings = dict[str, Any]


def make(molecule_name: str, file: Path, out: Path, *sizes: str) -> Path:
    """Run `data md17` with original labels."""
    command = ["data", "md17", molecule_name, "--labels", "original", "--npz", str(file), "--out", str(out)]
    assert main([*command, *sizes]) == 0
    return out


def synthetic_ethanol(file: Path, frames: int = 20) -> tuple[Path, np.ndarray]:
    """An original MD17 file of ethanol, with energies as large as aspirin's."""
    atoms, rng = molecule("CH3CH2OH"), np.random.default_rng(0)
    shape = (frames, len(atoms), 3)
    energies = -406_737.0 + rng.normal(scale=5.0, size=(frames, 1))
    np.savez(
        file,
        z=atoms.numbers,
        R=atoms.positions + rng.normal(scale=0.1, size=shape),
        E=energies,
        F=rng.normal(scale=20.0, size=shape),
    )
    return file, energies[:, 0]


@pytest.fixture
def md17_settings(run_settings: Settings) -> Settings:
    """A small EquiformerV2 with the paper's DeNS settings for MD17, on whatever `dataset` says."""
    run_settings["model"] |= {"use_pbc": False, "max_radius": 5.0, "max_neighbors": 20, "alpha_drop": 0.0}
    run_settings["model"]["drop_path_rate"] = 0.0
    dens = {"prob": 0.25, "std": 0.05, "corrupt_ratio": 0.25, "switch": "structure"}
    run_settings["dataset"] = {"train": {"transforms": {"dens": dens}}}
    run_settings["loss_functions"] = [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 80}},
        {"noise": {"fn": "l2mae", "coefficient": 5, "reduction": "separate", "decay": "linear"}},
    ]
    run_settings["task"] = {"prediction_dtype": "float32"}
    for name in ("clip_grad_norm", "ema_decay", "eval_every"):
        del run_settings["optim"][name]
    run_settings["optim"] |= {"max_epochs": 1, "optimizer_params": {"weight_decay": 1e-6}}
    return run_settings


def test_written_yaml_is_included_and_trains(tmp_path: Path, md17_settings: Settings, fairchem) -> None:
    file, _ = synthetic_ethanol(tmp_path / "ethanol.npz")
    out = make("ethanol", file, tmp_path / "set", "--train-size", "8", "--val-size", "4")
    output = fairchem("train", {"includes": [str(out / "data.yml")], **md17_settings})
    assert "step: 2.00e+00" in output and "step: 3.00e+00" not in output
    assert "DeNS corrupts each structure with probability p = 0.25" in output
    assert "is it the normaliser of another data set" not in output and "total energies where" not in output


def test_predictions_are_the_energies_of_the_file(
    tmp_path: Path, md17_settings: Settings, make_trainer
) -> None:
    """The metric that fairchem reports is that of predictions plus offset against the file, in double."""
    file, energies = synthetic_ethanol(tmp_path / "ethanol.npz")
    out = make("ethanol", file, tmp_path / "set", "--train-size", "8", "--val-size", "8")
    dataset = yaml.safe_load((out / "data.yml").read_text())["dataset"]
    transforms = dataset["train"]["transforms"]
    transforms |= md17_settings["dataset"]["train"]["transforms"]
    for target in ("energy", "forces"):  # as configs/md17 name them
        transforms["normalizer"][target] = {"file": str(out / f"{target}_normalizer.npz")}
    dataset["test"] = dict(dataset["val"])
    trainer = make_trainer({**md17_settings, "dataset": dataset})
    trainer.train(disable_eval_tqdm=True)
    metrics = trainer.validate(split="val", disable_tqdm=True)
    trainer.predict(trainer.test_loader, results_file="predictions", disable_tqdm=True)

    offset = yaml.safe_load((out / "summary.json").read_text())["energy_offset"]
    (results,) = tmp_path.rglob("s2ef_predictions.npz")
    predictions = np.load(results)
    frames = [int(name.split("_")[1]) for name in predictions["ids"]]
    assert [f"ethanol-{frame}_{frame}" for frame in frames] == predictions["ids"].tolist()
    errors = predictions["energy"].reshape(-1).astype(float) + offset - energies[frames]
    assert len(frames) == 8 and np.abs(errors).max() < 60
    assert np.abs(errors).mean() == pytest.approx(metrics["energy_mae"]["metric"], abs=5e-5)
    assert metrics["forces_mae"]["metric"] < 40  # the file's are of 16 on average


@pytest.mark.slow
@pytest.mark.parametrize("molecule_name", ["aspirin", "ethanol"])
def test_loss_falls_on_real_data(
    molecule_name: str, tmp_path: Path, md17_settings: Settings, real_data, fairchem
) -> None:
    out = make(
        molecule_name, real_data(f"rmd17/rmd17_{molecule_name}.npz"), tmp_path / "set", "--test-size", "50"
    )
    md17_settings["model"] |= {"num_layers": 2, "sphere_channels": 16, "edge_channels": 16}
    md17_settings["optim"] |= {"batch_size": 8, "max_epochs": 2}
    output = fairchem("train", {"includes": [str(out / "data.yml")], **md17_settings})
    losses = np.array([float(value) for value in re.findall(r"\bloss: (\S+e\S+),.* lr:", output)])
    assert len(losses) == 2 * 119
    first, last = losses[:50].mean(), losses[-50:].mean()
    print(f"{molecule_name}: loss {first:.2f} in steps 1-50, {last:.2f} in the last 50 of {len(losses)}")
    assert last < 0.6 * first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aspirin", "aspirin_l3", "aspirin_baseline"])
def test_shipped_yaml_on_real_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data, fairchem
) -> None:
    """Two steps of the paper's run at reduced size; the paths come from the one variable."""
    file = real_data("rmd17/rmd17_aspirin.npz")
    sizes = ("--train-size", "10", "--val-size", "2", "--test-size", "2")
    make("aspirin", file, tmp_path / "data" / "md17" / "aspirin", *sizes)
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(tmp_path / "data"))
    yml = CONFIGS / "md17" / f"{name}.yml"
    model = load_config(str(yml))[0]["model"]
    smaller = [
        f"--model.{key}={re.sub(r'([0-9]+)x', lambda count: f'{max(1, int(count[1]) // 16)}x', irreps)}"
        for key, irreps in model.items()
        if key
        in ("irreps_node_embedding", "irreps_pre_attn", "irreps_head", "irreps_mlp_mid", "irreps_feature")
    ]
    smaller.append("--model.num_layers=1")
    options = [
        "--logger=tensorboard",
        "--optim.max_epochs=1",
        "--optim.batch_size=5",
        "--optim.num_workers=0",
    ]
    output = fairchem("train", yml, *options, *smaller)
    assert "step: 2.00e+00" in output and "step: 3.00e+00" not in output
    assert ("DeNS is off" in output) is ("baseline" in name)
    losses = re.findall(r"\bloss: (\S+e\S+),.* lr:", output)
    assert len(losses) == 2 and np.isfinite([float(loss) for loss in losses]).all()
    assert "Predicting on test" not in output, (
        "a hundred thousand frames, each time the validation error falls"
    )

    # The header's command for the errors on the test split.
    best = tmp_path / "checkpoints" / "run" / "best_checkpoint.pt"
    test = tmp_path / "data" / "md17" / "aspirin" / "test"
    command = ["--checkpoint", str(best), f"--dataset.val.src={test}"]
    evaluated = fairchem("validate", yml, *command, *options, *smaller)
    assert re.search(r"energy_mae: \d+\.\d+, forces_mae: \d+\.\d+", evaluated.split("Evaluating on val.")[1])
