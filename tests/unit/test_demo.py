from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fairchem.core.common.utils import load_config
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from fairchem_dens.cli.main import main
from fairchem_dens.corruption import Corruption
from fairchem_dens.data.emt import EmtSettings, generate
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.demo import pictures, plan, report, results, runner
from fairchem_dens.demo.plan import Folder, Settings, Stage

DATA = EmtSettings(
    train_systems=3, val_systems=2, test_systems=2, frames_per_system=4, relaxation_steps=12, md_steps=12
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, generate(folder, DATA, progress=False)


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "out")
    made.make()
    return made


# ---------------------------------------------------------------------------------------------- plan


def test_configs_are_what_fairchem_reads_and_differ_only_in_dens(folder, data, monkeypatch):
    plan.write_configs(folder, Settings.make(budget="ci"), data[1])
    monkeypatch.chdir(folder.root)
    loaded = {}
    for run in plan.RUNS:
        loaded[run], _, duplicates = load_config(f"configs/{run}.yml")
        assert duplicates == []
        assert loaded[run]["trainer"] == "fairchem_dens.trainer.DeNSTrainer"
        assert loaded[run]["dataset"]["train"]["src"] == "data/train"
        assert loaded[run]["optim"]["batch_size"] == plan._BATCH_SIZE
    normalizer = loaded["dens"]["dataset"]["train"]["transforms"]["normalizer"]
    assert normalizer["forces"]["rmsd"] == pytest.approx(data[1]["splits"]["train"]["force_rms"], rel=1e-5)

    dens = loaded["dens"]["dataset"]["train"]["transforms"].pop("dens")
    assert Corruption.from_config(dens).prob == 0.5
    assert "noise" in loaded["dens"]["loss_functions"].pop()
    assert loaded["dens"] == loaded["baseline"]


def test_both_runs_get_the_same_command_but_for_their_names(folder):
    groups = list(plan.stages(Settings.make(budget="ci", seed=7)))
    assert [stage.name for group in groups for stage in group] == [
        f"{run}-{mode}" for mode in plan.MODES for run in plan.RUNS
    ]
    for baseline, dens in groups:
        assert "--seed 7" in baseline.command and "--cpu" in baseline.command
        assert baseline.command.replace("baseline", "dens") == dens.command


def test_commands_can_be_pasted(folder):
    plan.write_commands(folder, Settings.make(budget="ci"), {"OMP_NUM_THREADS": "1"})
    shown = subprocess.run(
        [
            "bash",
            "-euc",
            folder.commands.read_text().replace("fairchem --mode", "echo fairchem --mode") + "\npwd",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    commands = shown.stdout.splitlines()
    assert commands[-1] == str(folder.root)
    assert commands[:-1] == [
        stage.command for group in plan.stages(Settings.make(budget="ci")) for stage in group
    ]


def test_number_of_training_frames_is_rounded_up_to_systems():
    settings = Settings.make(budget="ci", train_frames=41, epochs=3)
    assert settings.data.train_systems == 11 and settings.epochs == 3


@pytest.mark.parametrize("options", [{"epochs": 0}, {"train_frames": -1}])
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=r"'--(epochs|train-frames)' must be at least 1"):
        Settings.make(**options)


def test_folder_belongs_to_one_demo(folder, tmp_path):
    settings = Settings.make(budget="ci")
    plan.claim(Folder(tmp_path / "new"), settings)
    plan.claim(Folder(tmp_path / "new"), settings)
    with pytest.raises(ValueError, match=r"other settings \(different: seed, data\)"):
        plan.claim(Folder(tmp_path / "new"), Settings.make(budget="ci", seed=2))


def test_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["demo", "--out", str(tmp_path), "--budget", "ci", "--cpu"]) == 2
    assert "is not the folder of a demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_gpu_that_is_not_there_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "--gpu", "--out", str(tmp_path / "out")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- runner


def stage(run="baseline", mode="train", code="pass"):
    return Stage(run, mode, ("-c", code))


@pytest.fixture
def python_instead_of_fairchem(monkeypatch):
    monkeypatch.setattr(runner, "fairchem_executable", lambda: [sys.executable])


def test_finished_commands_are_recorded_and_not_repeated(folder, python_instead_of_fairchem):
    code = "open('ran', 'a').write('x')"
    with runner.locked(folder) as lock:
        runner.run_group([stage(code=code)], folder, lock=lock)
        runner.run_group([stage(code=code)], folder, lock=lock)
    assert (folder.root / "ran").read_text() == "x"


def test_failed_command_is_shown_with_the_end_of_its_log_and_stops_the_other(
    folder, python_instead_of_fairchem
):
    fails = stage(code="print('all went well'); raise SystemExit('but then it did not')")
    waits = stage("dens", code="import time; time.sleep(60)")
    started = time.monotonic()
    with runner.locked(folder) as lock, pytest.raises(runner.StageError) as error:
        runner.run_group([fails, waits], folder, lock=lock, at_once=2)
    assert time.monotonic() - started < 30
    assert "but then it did not" in str(error.value) and "status 1" in str(error.value)
    assert str(folder.logs / "baseline-train.log") in str(error.value)
    assert folder.read_state("baseline-train") is None and folder.read_state("dens-train") is None


def test_progress_is_read_from_the_log(folder, python_instead_of_fairchem):
    lines = [
        "trainer.py:1: (INFO): forces_mae: 9.00e-01, loss: 1.2e+01, epoch: 1.0e+00, step: 1.20e+02",
        "trainer.py:2: (INFO): Evaluating on val.",
        "trainer.py:3: (INFO): forces_mae: 0.2500, loss: 3.0000, epoch: 4.0000",
        "trainer.py:1: (INFO): forces_mae: 8.00e-01, loss: 1.2e+01, epoch: 1.0e+00, step: 1.30e+02",
    ]
    with runner.locked(folder) as lock:
        command = runner._Command(stage(code=f"print({chr(10).join(lines)!r})"), folder, lock)
        command.process.wait()
        assert command.read_progress() == (130, 0.25)


def test_interrupt_stops_the_commands(folder, python_instead_of_fairchem):
    code = "open('started', 'w'); import time; time.sleep(60)"
    script = (
        "import os, sys, threading, time, signal\n"
        "from fairchem_dens.demo import runner\n"
        "from fairchem_dens.demo.plan import Folder, Stage\n"
        "runner.fairchem_executable = lambda: [sys.executable]\n"
        f"folder = Folder({str(folder.root)!r})\n"
        "with runner.sigterm_as_interrupt(), runner.locked(folder) as lock:\n"
        f"    runner.run_group([Stage('dens', 'train', ('-c', {code!r}))], folder, lock=lock)\n"
    )
    demo = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder.root / "started").exists())
    demo.send_signal(signal.SIGTERM)
    assert "KeyboardInterrupt" in demo.communicate(timeout=30)[1]
    # The command held the lock as well: it is free only if both have ended.
    with runner.locked(folder, patience=0):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_commands_end_with_a_killed_demo_and_the_next_one_waits_for_them(folder):
    code = (
        "import signal, time, sys\n"
        "def stop(*_):\n    time.sleep(1); open('stopped', 'w'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\nopen('started', 'w')\ntime.sleep(60)"
    )
    script = (
        "import sys\nfrom fairchem_dens.demo import runner\n"
        "from fairchem_dens.demo.plan import Folder, Stage\n"
        "runner.fairchem_executable = lambda: [sys.executable]\n"
        f"folder = Folder({str(folder.root)!r})\n"
        "with runner.locked(folder) as lock:\n"
        f"    runner.run_group([Stage('dens', 'train', ('-c', {code!r}))], folder, lock=lock)\n"
    )
    demo = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: (folder.root / "started").exists())
    demo.kill()
    demo.wait()
    with runner.locked(folder, patience=30):
        assert (folder.root / "stopped").exists()


def test_folder_in_use_is_said(folder):
    with runner.locked(folder), pytest.raises(ValueError, match="Another demo is running"):  # noqa: SIM117
        with runner.locked(folder, patience=0):
            pass


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------- results


def test_resumed_curves_are_those_of_the_latest_steps(tmp_path):
    for session, (first, last) in enumerate([(1, 30), (21, 40)]):
        with SummaryWriter(tmp_path, filename_suffix=f".{session}") as writer:
            for step in range(first, last + 1):
                writer.add_scalar(
                    "train/loss", 100 * session + step, step, walltime=1000 * session + 2.0 * step
                )
        next(tmp_path.glob(f"*.{session}")).rename(tmp_path / f"events.out.tfevents.170000000{session}")
    curve = results.read_curves(tmp_path)["train/loss"]
    assert list(curve) == list(range(1, 41))
    assert curve[20] == 20 and curve[21] == 121 and curve[40] == 140
    # 40 steps of 2 s, however long the break was.
    assert results.training_seconds(tmp_path) == pytest.approx(80)


def test_missing_events_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard file"):
        results.read_curves(tmp_path)


def write_predictions(file, structures, offset, force_offset):
    # fairchem sorts by id, as text, and stores free atoms only.
    ordered = sorted(structures, key=lambda item: f"{item.sid}_{item.fid}")
    free = [item.forces[item.fixed == 0].numpy() + force_offset for item in ordered]
    np.savez(
        file,
        ids=np.array([f"{item.sid}_{item.fid}" for item in ordered]),
        energy=np.array([[item.energy + offset] for item in ordered], dtype=np.float32),
        forces=np.concatenate(free),
        chunk_idx=np.cumsum([len(rows) for rows in free])[:-1],
    )


def test_errors_of_predictions_are_those_of_the_definition(data, tmp_path):
    structures = list(read_lmdb(data[0] / "test"))
    shift = np.array([0.3, 0.0, 0.0], dtype=np.float32)
    write_predictions(tmp_path / "p.npz", structures, -0.25, shift)
    found = results.prediction_metrics(tmp_path / "p.npz", data[0] / "test")
    assert found["energy_mae"] == pytest.approx(0.25, abs=1e-5)
    assert found["forces_mae"] == pytest.approx(0.1, abs=1e-5)
    free = torch.cat([item.forces[item.fixed == 0] for item in structures])
    cosine = torch.cosine_similarity(free, free + torch.from_numpy(shift), dim=1).mean().item()
    assert found["forces_cosine_similarity"] == pytest.approx(cosine, abs=1e-5)
    write_predictions(tmp_path / "q.npz", structures[1:], 0.0, 0.0)
    with pytest.raises(ValueError, match=f"no prediction for the structure {structures[0].sid}_0"):
        results.prediction_metrics(tmp_path / "q.npz", data[0] / "test")


class KnowsNoise(torch.nn.Module):
    """Answers with the noise of its batch, in units of σ, times a factor; forces are half the true ones."""

    def __init__(self, factor: float, std: float) -> None:
        super().__init__()
        self.factor, self.std = factor, std

    def forward(self, batch):
        # Off everywhere else, as a network would be: only corrupted atoms may move.
        noise = self.factor * batch.noise_vec / self.std if "noise_vec" in batch else None
        if noise is not None:
            noise = torch.where(batch.noise_mask[:, None], noise, torch.ones_like(noise))
        return {"noise": noise, "forces": 0.25 * batch.forces}


@pytest.mark.parametrize("factor", [0.0, 0.75, 1.0])
def test_denoising_error_is_what_the_model_leaves(data, factor):
    structures = list(read_lmdb(data[0] / "val"))
    trained = results.Trained(KnowsNoise(factor, 0.2), 1.0)
    denoised = results.denoise(trained, structures, Corruption(prob=0.1, std=0.2, corrupt_ratio=0.5))
    mae, before = results.denoising_mae(denoised)
    assert mae == pytest.approx((1 - factor) * before, abs=1e-6)
    # Mean absolute value of a normal distribution.
    assert before == pytest.approx(0.2 * np.sqrt(2 / np.pi), rel=0.2)
    for item in denoised:
        clean = item.clean.pos.numpy()
        assert np.array_equal(item.denoised_pos[~item.noise_mask], clean[~item.noise_mask])
        assert not item.noise_mask[item.clean.fixed.numpy() == 1].any()
        assert item.rmsd(item.denoised_pos) == pytest.approx(
            (1 - factor) * item.rmsd(item.corrupted_pos), abs=1e-5
        )


def test_force_error_is_over_free_atoms_in_physical_units(data):
    structures = list(read_lmdb(data[0] / "val"))
    free = torch.cat([item.forces[item.fixed == 0] for item in structures])
    found = results.force_mae(results.Trained(KnowsNoise(1.0, 0.2), 2.0), structures)
    assert found == pytest.approx(0.5 * free.abs().mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- report


def measured(force_change, energy_change):
    def errors(energy, forces, cosine):
        return {"energy_mae": energy, "forces_mae": forces, "forces_cosine_similarity": cosine}

    baseline = errors(0.5, 0.2, 0.7)
    dens = errors(0.5 * (1 + energy_change), 0.2 * (1 + force_change), 0.77)
    rest = {"train_forces_mae": 0.02, "train_seconds": 100.0}
    return {
        "baseline": {"val": baseline, "test": baseline, **rest},
        "dens": {"val": dens, "test": dens, **rest},
        "denoising": {"mae": 0.04, "mae_of_no_guess": 0.08, "std": 0.1, "corrupt_ratio": 0.5, "atoms": 40},
    }


def test_table_shows_units_and_differences():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.table(measured(-0.1, 0.25)).splitlines()
    ]
    assert ["val: force MAE, meV/Å", "200.0", "180.0", "-10.0 %"] in rows
    assert ["test: energy MAE, meV", "500.0", "625.0", "+25.0 %"] in rows
    assert ["test: force cosine", "0.700", "0.770", "+10.0 %"] in rows
    assert ["val: denoising MAE, Å", "n/a", "0.0400", "0.0800 if no noise is guessed"] in rows
    assert ["train: force MAE, meV/Å", "20.0", "20.0", "val is 10.0 and 9.0 times that"] in rows
    assert len({len(line) for line in report.table(measured(0.1, 0.2)).splitlines()}) == 1


@pytest.mark.parametrize(
    ("force_change", "energy_change", "says"),
    [
        (-0.1, -0.2, "the force error is 10.0 % lower and the energy error 20.0 % lower."),
        (0.1, 0.2, "DeNS did not pay"),
        (-0.1, 0.2, "DeNS paid for forces only"),
        (0.1, -0.2, "DeNS paid for energies only"),
        (0.001, -0.002, "the force error is the same within 1 % and the energy error the same within 1 %."),
    ],
)
def test_verdict_is_what_was_measured(force_change, energy_change, says):
    assert says in report.verdict(measured(force_change, energy_change))


def test_report_is_complete(data):
    settings = dataclasses.replace(Settings.make(budget="ci"), data=DATA)
    text = report.write_report(settings, json.loads(json.dumps(data[1])), measured(-0.1, -0.2))
    for part in (
        "curves.png",
        "structure.png",
        "12 frames of 3 systems",
        "fairchem --mode predict",
        "10.0 times",
    ):
        assert part in text


# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn(data, tmp_path):
    structures = list(read_lmdb(data[0] / "val"))
    denoised = results.denoise(
        results.Trained(KnowsNoise(0.5, 0.1), 1.0),
        structures,
        Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5),
    )
    pictures.draw_structure(tmp_path / "s.png", results.typical(denoised), std=0.1, title="a structure")
    tags = [f"{split}/{name}" for split in ("train", "val") for name in (*results.METRICS, "loss")]
    curve = {step: 1.0 / step for step in range(1, 61)}
    curves = {run: dict.fromkeys(tags, curve) for run in plan.RUNS}
    curves["dens"]["train/denoising_pos_mae"] = curve
    pictures.draw_curves(tmp_path / "c.png", curves, steps_per_epoch=7, no_denoising=0.08, title="curves")
    for name in ("s.png", "c.png"):
        image = imread(tmp_path / name)
        assert min(image.shape[:2]) > 1000 and image[..., :3].std() > 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "s.png"]


def test_adsorbate_is_drawn_in_one_piece():
    cell = np.diag([5.0, 5.0, 20.0])
    positions = np.array([[1.0, 1, 1], [4.9, 0.1, 8], [0.2, 4.8, 8.5]])
    moved = pictures._adsorbate_in_one_piece(positions, cell, np.array([False, True, True]))
    assert np.linalg.norm(moved[1] - moved[2]) < 1.0
    assert np.array_equal(moved[0], positions[0])
    assert np.allclose((moved - positions)[:, :2] % 5.0 % 5.0, 0) and np.allclose(
        moved[:, 2], positions[:, 2]
    )
