"""Runs of the real `fairchem` command: training, resuming, stopping, evaluating."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

STEPS = 12  # 24 structures, batch 4, 2 epochs


class Runner:
    """Starts `fairchem` on a YAML in a folder of its own."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.yml = folder / "run.yml"
        self.yml.write_text(yaml.safe_dump(settings))

    def command(self, name: str, mode: str, *options: str) -> list[str]:
        beside = shutil.which("fairchem", path=str(Path(sys.executable).parent))
        program = [beside] if beside else [sys.executable, "-m", "fairchem.core._cli"]
        return [
            *program,
            *("--mode", mode, "--config-yml", str(self.yml), "--cpu", "--run-dir", str(self.folder)),
            *("--timestamp-id", name, "--print-every", "1"),
            *options,
        ]

    def start(self, name: str, mode: str = "train", *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, mode, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )

    def run(self, name: str, mode: str = "train", *options: str) -> str:
        process = self.start(name, mode, *options)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-6000:]
        return output

    def stop_at(self, name: str, words: str, signum: int, status: int) -> None:
        """Send a signal once something has been said, and expect this exit status."""
        process = self.start(name)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if words in line:
                process.send_signal(signum)
                break
        said += process.stdout.readlines()
        assert process.wait(timeout=120) == status, "".join(said)[-6000:]

    def file(self, name: str, file: str = "checkpoint.pt") -> Path:
        return self.folder / "checkpoints" / name / file

    def checkpoint(self, name: str, file: str = "checkpoint.pt") -> dict[str, Any]:
        # As torch 2.6 and later load by default: a file of ours must need nothing more.
        return torch.load(self.file(name, file), map_location="cpu", weights_only=True)


@pytest.fixture
def runner(tmp_path: Path) -> Callable[[dict[str, Any]], Runner]:
    return lambda settings: Runner(tmp_path, settings)


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["step"] == other["step"] and one["epoch"] == other["epoch"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for ours, theirs in zip(one["ema"]["shadow_params"], other["ema"]["shadow_params"], strict=True):
        assert torch.equal(ours, theirs)
    assert one["scheduler"]["last_epoch"] == other["scheduler"]["last_epoch"]
    assert one["best_val_metric"] == other["best_val_metric"]


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["structure", "batch"])
def test_killed_and_resumed_is_undisturbed(runner, run_settings, switch: str) -> None:
    run_settings["dataset"]["train"]["transforms"]["dens"]["switch"] = switch
    run_settings["optim"] |= {"eval_every": 6, "checkpoint_every": 4, "num_workers": 2}
    run = runner(run_settings)
    run.run("whole")
    whole = run.checkpoint("whole")
    assert whole["step"] == STEPS

    run.stop_at("killed", "step: 6.00e+00", signal.SIGKILL, -signal.SIGKILL)
    assert run.checkpoint("killed")["step"] == 4
    run.stop_at("killed", "step: 7.00e+00", signal.SIGTERM, 128 + signal.SIGTERM)
    assert 7 <= run.checkpoint("killed")["step"] < STEPS
    run.run("killed")
    assert_same_run(whole, run.checkpoint("killed"))
    for ours, theirs in zip(
        run.checkpoint("whole", "best_checkpoint.pt")["state_dict"].values(),
        run.checkpoint("killed", "best_checkpoint.pt")["state_dict"].values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_short_run_leaves_a_checkpoint_that_describes_itself(runner, run_settings) -> None:
    run_settings["model"]["name"] = "equiformer_v2_dens"
    run_settings["trainer"] = "dens"
    run = runner(run_settings)
    output = run.run("short")
    checkpoint = run.checkpoint("short")
    config = checkpoint["config"]
    assert checkpoint["step"] == STEPS
    assert config["trainer"] == "fairchem_dens.trainer.DeNSTrainer"
    assert config["model"]["name"] == "fairchem_dens.models.EquiformerV2DeNS"
    assert config["fairchem_dens"]["checkpoint_version"] == 1
    assert not list(run.file("short").parent.glob(".*")), "something was left half written"
    for said in (
        "DeNS corrupts each structure with probability p = 0.5",
        "noise: σ = 0.1 Å",
        "corrupted atoms: each with probability 0.5, free ones only",
        "loss: coefficient 10",
        "effective batch: 4 structures × 1 ranks = 4",
    ):
        assert said in output


@pytest.mark.slow
def test_warm_up_shorter_than_a_step(runner, run_settings) -> None:
    run_settings["optim"]["scheduler_params"]["warmup_epochs"] = 0.0
    run = runner(run_settings)
    assert "lr: 4.00e-04" in run.run("warm")  # 0.2 of the full rate at first


def test_validate_predict_and_calculator_agree(runner, run_settings, lmdb_folders, python) -> None:
    run_settings["task"] = {"prediction_dtype": "float32"}
    run = runner(run_settings)
    run.run("trained")
    best = run.file("trained")
    output = run.run("evaluated", "validate", "--checkpoint", str(best))
    assert "forces_mae" in output and "denoising" not in output.split("Evaluating on val.")[1]
    run.run("evaluated", "predict", "--checkpoint", str(best))
    predictions = np.load(run.folder / "results" / "evaluated" / "s2ef_predictions.npz")
    assert sorted(predictions["ids"]) == sorted(f"{sid}_0" for sid in range(200, 206))
    assert np.isfinite(predictions["forces"]).all() and predictions["forces"].dtype == np.float32

    # A process that knows only fairchem opens the checkpoint by the names that it holds.
    said = python(
        f"""
from fairchem.core import OCPCalculator
from ase.build import fcc111, add_adsorbate
slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
add_adsorbate(slab, "O", 1.2, "fcc")
slab.pbc = True
slab.calc = OCPCalculator(checkpoint_path={str(best)!r}, cpu=True)
print("energy", slab.get_potential_energy(), slab.get_forces().shape)
"""
    )
    assert "energy" in said and "(13, 3)" in said


@pytest.mark.slow
def test_authors_yaml_trains(runner, run_settings) -> None:
    """The keys of the authors' code, with their trainer's and model's name."""
    run_settings["trainer"] = "denoising_forces"
    run_settings["model"]["name"] = "equiformer_v2_dens"
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    train = run_settings["dataset"]["train"]
    del train["transforms"]["dens"]
    train["transforms"]["normalizer"] = {
        name: {"mean": values["mean"], "stdev": values["rmsd"]}
        for name, values in train["transforms"]["normalizer"].items()
    }
    run_settings["optim"] |= {
        "load_balancing": "atoms",
        "use_denoising_pos": True,
        "denoising_pos_params": {
            "prob": 0.5,
            "fixed_noise_std": True,
            "std": 0.1,
            "num_steps": 50,
            "std_low": 0.01,
            "std_high": 0.5,
            "corrupt_ratio": 0.5,
        },
        "denoising_pos_coefficient": 10,
    }
    output = runner(run_settings).run("authors")
    assert "DeNS corrupts each batch, one coin for all ranks, with probability p = 0.5" in output
    assert "denoising_pos_mae" in output


@pytest.mark.slow
def test_baseline_is_the_same_network(runner, run_settings) -> None:
    """Without DeNS the same weights start, and the noise head rests."""
    dens = runner(run_settings)
    dens.run("dens")
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    baseline = runner(run_settings)
    output = baseline.run("baseline")
    assert "DeNS is off" in output and "denoising_pos_mae" not in output
    one, other = dens.checkpoint("dens")["state_dict"], baseline.checkpoint("baseline")["state_dict"]
    assert one.keys() == other.keys()
    name = "module.sphere_embedding.weight"  # fairchem wraps the model on one rank too
    assert not torch.equal(one[name], other[name])


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_evaluation(runner, run_settings) -> None:
    """The weights are swapped for their moving average then; the file must hold the real ones."""
    run_settings["optim"] |= {"eval_every": 6, "checkpoint_every": 6}
    run = runner(run_settings)
    run.run("whole")
    run.stop_at("stopped", "Evaluating on val.", signal.SIGTERM, 128 + signal.SIGTERM)
    assert run.checkpoint("stopped")["step"] in (6, 7)
    run.run("stopped")
    assert_same_run(run.checkpoint("whole"), run.checkpoint("stopped"))


@pytest.mark.slow
def test_baseline_with_fairchems_own_model(runner, run_settings) -> None:
    """The trainer takes any model; without DeNS nothing is asked of it."""
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["model"]["name"] = "equiformer_v2"
    runner(run_settings).run("stock")


@pytest.mark.slow
def test_two_ranks_equal_one(runner, run_settings) -> None:
    """The same global batch on one rank and on two: the same weights after an epoch.

    Dropout is off. The random roll of edge frames differs between ranks; with it the equality is to the
    grids' accuracy.
    """
    run_settings["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "grid_resolution": 14}
    run_settings["optim"] |= {"optimizer": "SGD", "optimizer_params": {}, "lr_initial": 1e-4, "max_epochs": 1}
    run = runner(run_settings)
    run.run("one")
    run_settings["optim"]["batch_size"] = 2
    Runner(run.folder, run_settings).run("two", "train", "--num-gpus", "2")
    one, two = run.checkpoint("one"), run.checkpoint("two")
    assert one["step"] == two["step"] == 6
    changed = 0.0
    start = Runner(run.folder, {**run_settings, "optim": {**run_settings["optim"], "lr_initial": 0.0}})
    start.run("start")
    initial = start.checkpoint("start")["state_dict"]
    for name, value in one["state_dict"].items():
        other = two["state_dict"][name]
        step = (value - initial[name]).abs().max().item()
        changed = max(changed, step)
        torch.testing.assert_close(other, value, rtol=0, atol=max(2e-3 * step, 1e-7), msg=name)
    assert changed > 1e-4


def test_no_file_is_written_in_the_middle_of_an_update(make_trainer, run_settings) -> None:
    trainer = make_trainer(run_settings)
    trainer.train(disable_eval_tqdm=True)
    trainer._begin_update()
    assert trainer.save() is None
    trainer._updating = False
    trainer.step += 1  # fairchem has begun another step, which has changed nothing yet
    path = trainer.save()
    assert torch.load(path, weights_only=True)["step"] == STEPS
    assert trainer.step == STEPS + 1
