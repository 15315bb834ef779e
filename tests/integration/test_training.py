"""Runs of the real `fairchem` command: training, resuming, stopping."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 12  # 24 structures, batch 4, 2 epochs


def stop_at(process: subprocess.Popen[str], words: str, signum: int, status: int) -> None:
    """Send a signal once something has been said, and expect this exit status."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            process.send_signal(signum)
            break
    said += process.stdout.readlines()
    assert process.wait(timeout=120) == status, "".join(said)[-6000:]


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
def test_killed_and_resumed_is_undisturbed(fairchem, run_settings, switch: str) -> None:
    run_settings["dataset"]["train"]["transforms"]["dens"]["switch"] = switch
    run_settings["optim"] |= {"eval_every": 6, "checkpoint_every": 4, "num_workers": 2}
    fairchem("train", run_settings, name="whole")
    whole = fairchem.checkpoint("whole")
    assert whole["step"] == STEPS

    stop_at(
        fairchem.start("train", run_settings, name="killed"),
        "step: 6.00e+00",
        signal.SIGKILL,
        -signal.SIGKILL,
    )
    assert fairchem.checkpoint("killed")["step"] == 4
    stop_at(
        fairchem.start("train", run_settings, name="killed"),
        "step: 7.00e+00",
        signal.SIGTERM,
        128 + signal.SIGTERM,
    )
    assert 7 <= fairchem.checkpoint("killed")["step"] < STEPS
    fairchem("train", run_settings, name="killed")
    assert_same_run(whole, fairchem.checkpoint("killed"))
    for ours, theirs in zip(
        fairchem.checkpoint("whole", "best_checkpoint.pt")["state_dict"].values(),
        fairchem.checkpoint("killed", "best_checkpoint.pt")["state_dict"].values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_short_run_leaves_a_checkpoint_that_describes_itself(fairchem, run_settings) -> None:
    run_settings["model"]["name"] = "equiformer_v2_dens"
    run_settings["trainer"] = "dens"
    output = fairchem("train", run_settings, name="short")
    checkpoint = fairchem.checkpoint("short")
    config = checkpoint["config"]
    assert checkpoint["step"] == STEPS
    assert config["trainer"] == "fairchem_dens.trainer.DeNSTrainer"
    assert config["model"]["name"] == "fairchem_dens.models.EquiformerV2DeNS"
    assert config["fairchem_dens"]["checkpoint_version"] == 1
    assert not list(fairchem.file("short").parent.glob(".*")), "something was left half written"
    for said in (
        "DeNS corrupts each structure with probability p = 0.5",
        "noise: σ = 0.1 Å",
        "corrupted atoms: each with probability 0.5, free ones only",
        "loss: coefficient 10",
        "effective batch: 4 structures × 1 ranks = 4",
    ):
        assert said in output


@pytest.mark.slow
def test_warm_up_shorter_than_a_step(fairchem, run_settings) -> None:
    run_settings["optim"]["scheduler_params"]["warmup_epochs"] = 0.0
    assert "lr: 4.00e-04" in fairchem("train", run_settings, name="warm")  # 0.2 of the full rate at first


@pytest.mark.slow
def test_authors_yaml_trains(fairchem, run_settings) -> None:
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
    output = fairchem("train", run_settings, name="authors")
    assert "DeNS corrupts each batch, one coin for all ranks, with probability p = 0.5" in output
    assert "denoising_pos_mae" in output


@pytest.mark.slow
def test_baseline_is_the_same_network(fairchem, run_settings) -> None:
    """Without DeNS the same weights start, and the noise head rests."""
    fairchem("train", run_settings, name="dens")
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    output = fairchem("train", run_settings, name="baseline")
    assert "DeNS is off" in output and "denoising_pos_mae" not in output
    one, other = (fairchem.checkpoint(name)["state_dict"] for name in ("dens", "baseline"))
    assert one.keys() == other.keys()
    name = "module.sphere_embedding.weight"  # fairchem wraps the model on one rank too
    assert not torch.equal(one[name], other[name])


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_evaluation(fairchem, run_settings) -> None:
    """The weights are swapped for their moving average then; the file must hold the real ones."""
    run_settings["optim"] |= {"eval_every": 6, "checkpoint_every": 6}
    fairchem("train", run_settings, name="whole")
    stop_at(
        fairchem.start("train", run_settings, name="stopped"),
        "Evaluating on val.",
        signal.SIGTERM,
        128 + signal.SIGTERM,
    )
    assert fairchem.checkpoint("stopped")["step"] in (6, 7)
    fairchem("train", run_settings, name="stopped")
    assert_same_run(fairchem.checkpoint("whole"), fairchem.checkpoint("stopped"))


@pytest.mark.slow
def test_sigusr2_to_all_processes_of_a_run(fairchem, run_settings, monkeypatch) -> None:
    """As SLURM sends it, to the loader workers too, which must not write what they know of the trainer."""
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), support]))
    monkeypatch.setenv("PYTHONPATH", path)
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    run_settings["optim"] |= {"num_workers": 2, "max_epochs": 8}
    fairchem("train", run_settings, name="whole")
    process = fairchem.start("train", run_settings, name="stopped")
    assert process.stdout is not None
    for line in process.stdout:
        if "step: 1.00e+01" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGUSR2)
    process.send_signal(signal.SIGUSR2)
    said = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signal.SIGUSR2, said[-6000:]
    assert 10 <= fairchem.checkpoint("stopped")["step"] < 48
    fairchem("train", run_settings, name="stopped")
    assert_same_run(fairchem.checkpoint("whole"), fairchem.checkpoint("stopped"))


@pytest.mark.slow
def test_baseline_with_fairchems_own_model(fairchem, run_settings) -> None:
    """The trainer takes any model; without DeNS nothing is asked of it."""
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["model"]["name"] = "equiformer_v2"
    fairchem("train", run_settings, name="stock")


@pytest.mark.slow
def test_two_ranks_equal_one(fairchem, run_settings) -> None:
    """The same global batch on one rank and on two: the same weights after an epoch.

    Dropout is off. The random roll of edge frames differs between ranks; with it the equality is to the
    grids' accuracy.
    """
    run_settings["model"] |= {"alpha_drop": 0.0, "drop_path_rate": 0.0, "grid_resolution": 14}
    run_settings["optim"] |= {"optimizer": "SGD", "optimizer_params": {}, "lr_initial": 1e-4, "max_epochs": 1}
    fairchem("train", run_settings, name="one")
    run_settings["optim"]["batch_size"] = 2
    fairchem("train", run_settings, "--num-gpus", "2", name="two")
    one, two = fairchem.checkpoint("one"), fairchem.checkpoint("two")
    assert one["step"] == two["step"] == 6
    changed = 0.0
    run_settings["optim"]["lr_initial"] = 0.0
    fairchem("train", run_settings, name="start")
    initial = fairchem.checkpoint("start")["state_dict"]
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
