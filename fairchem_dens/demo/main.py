"""The demo from its first to its last step."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import yaml

from fairchem_dens.corruption import Corruption
from fairchem_dens.data.emt import generate, read_summary
from fairchem_dens.data.folder import write_text
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.demo import pictures, plan, report, results, runner
from fairchem_dens.demo.plan import BUDGETS, RUNS, TITLES, Folder, Settings

_HEADLINES = {
    "train": "Training both models for {steps} steps (logs/*-train.log)",
    "validate": "Validating both (logs/*-validate.log)",
    "predict": "Predicting on the test split (logs/*-predict.log)",
}


def run_demo(folder: Folder, settings: Settings) -> dict[str, Any]:
    """Run the demo, or what is left of it, and return what was measured.

    Args:
        folder: where everything ends up.
        settings: the same as at the first start, if the demo was cut off.

    Raises:
        ValueError: the folder belongs to something else.
        fairchem_dens.demo.runner.StageError: a fairchem command failed.
    """
    started = time.monotonic()
    plan.refuse_foreign(folder)
    with runner.sigterm_as_interrupt(), runner.locked(folder) as lock:
        plan.claim(folder, settings)
        _say(f"Demo '{settings.budget}' in {folder.root}: {BUDGETS[settings.budget].says}")
        summary = _make_data(folder, settings)
        plan.write_configs(folder, settings, summary)
        plan.write_commands(folder, settings, runner.ENVIRONMENT)
        total = settings.epochs * plan.steps_per_epoch(summary["splits"]["train"]["frames"])
        for group in plan.stages(settings):
            mode = group[0].mode
            headline = _HEADLINES[mode].format(steps=total)
            if all(folder.read_state(stage.name) is not None for stage in group):
                _say(f"{headline}: done before")
                continue
            _say(headline)
            for stage in group:
                print(f"  $ {stage.command}", flush=True)
            runner.run_group(group, folder, lock=lock, total_steps=total if mode == "train" else None)
        _say("Collecting results")
        measured = _collect(folder, summary)
        write_text(folder.report, report.write_report(settings, summary, measured))
    print(f"\n{report.table(measured)}\n\n{report.verdict(measured)}\n")
    print(f"{report.REGIME}\n")
    print(f"All of it is in {folder.root} (this start took {time.monotonic() - started:.0f} s):")
    for path, what in (
        (folder.report, "the table, how it was measured, and on which data"),
        (folder.curves, "learning curves"),
        (folder.picture, "one structure clean, corrupted and denoised"),
        (folder.predictions, "predictions on the test split"),
        (folder.commands, "the exact commands, to paste into a shell"),
        (folder.configs, "their YAMLs"),
    ):
        print(f"  {path.relative_to(folder.root)!s:18} {what}")
    return measured


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _make_data(folder: Folder, settings: Settings) -> dict[str, Any]:
    if read_summary(folder.data) is not None:
        _say("Data set: generated before")
    else:
        _say("Generating the data set with ASE's EMT potential")
    summary = generate(folder.data, settings.data)
    for name, split in summary["splits"].items():
        left_out = sum(split["frames_left_out"].values())
        print(
            f"  {name:5} {split['frames']:5} frames of {split['systems']} systems, "
            f"{split['atoms'][0]} to {split['atoms'][1]} atoms; "
            f"{left_out} of {split['frames_computed']} computed frames were left out"
        )
    return summary


def _collect(folder: Folder, summary: dict[str, Any]) -> dict[str, Any]:
    per_epoch = plan.steps_per_epoch(summary["splits"]["train"]["frames"])
    curves = {run: results.read_curves(folder.events(run)) for run in RUNS}
    structures = {split: list(read_lmdb(folder.data / split)) for split in ("train", "val")}
    measured: dict[str, Any] = {}
    for run in RUNS:
        # fairchem writes into a folder named after the command; one folder for both is easier to find.
        written = folder.root / "results" / f"{run}-predict" / results.PREDICTIONS_FILE
        predictions = folder.predictions / f"{run}_{results.PREDICTIONS_FILE}"
        shutil.copyfile(written, predictions)
        trained = results.load_trained(folder.checkpoint(run))
        measured[run] = {
            "val": results.validation_metrics(folder, run),
            "test": results.prediction_metrics(predictions, folder.data / "test"),
            "train_forces_mae": results.force_mae(trained, structures["train"]),
            "train_seconds": results.training_seconds(folder.events(run)),
        }

    corruption = _corruption(folder)
    trained = results.load_trained(folder.checkpoint("dens"))
    denoised = results.denoise(trained, structures["val"], corruption)
    mae, no_guess = results.denoising_mae(denoised)
    measured["denoising"] = {
        "mae": mae,
        "mae_of_no_guess": no_guess,
        "std": corruption.noise_scale,
        "corrupt_ratio": 1.0 if corruption.corrupt_ratio is None else corruption.corrupt_ratio,
        "atoms": int(sum(item.noise_mask.sum() for item in denoised)),
    }
    write_text(folder.results, json.dumps(measured, indent=2) + "\n")

    frames = summary["splits"]["train"]["frames"]
    pictures.draw_curves(
        folder.curves,
        curves,
        steps_per_epoch=per_epoch,
        no_denoising=no_guess,
        title=f"EquiformerV2 {TITLES['baseline']} and {TITLES['dens']}: "
        f"{frames} training frames, {per_epoch} steps an epoch",
    )
    shown = results.typical(denoised)
    pictures.draw_structure(
        folder.picture,
        shown,
        std=corruption.noise_scale,
        title=f"A structure of the validation split (sid {shown.clean.sid}, fid {shown.clean.fid}), "
        "denoised neither well nor badly: the median",
    )
    return measured


def _corruption(folder: Folder) -> Corruption:
    """The corruption that the run with DeNS was trained with."""
    shipped = yaml.safe_load((folder.configs / "demo" / "dens.yml").read_text(encoding="utf-8"))
    return Corruption.from_config(shipped["dataset"]["train"]["transforms"]["dens"])
