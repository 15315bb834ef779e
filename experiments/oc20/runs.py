"""The trainings on real OC20 trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.common.data import find_real_data, read_summary
from experiments.common.evaluate import train_force_mae
from experiments.common.experiment import Context
from experiments.common.runs import Run
from experiments.common.settings import merged, read_run_yaml, read_yaml, schedule
from experiments.common.statistics import select
from fairchem_dens.data.from_ase.convert import from_ase
from fairchem_dens.data.from_ase.settings import Settings

HERE = Path(__file__).parent
ORIGIN = "ASE trajectories of OC20 relaxations; those of the results are debug data of fairchem's history"
EQUAL_TIME = "baseline_equal_time"


def make_data(context: Context) -> Path:
    """Convert the trajectories, unless that is done; return the folder of the LMDBs."""
    folder = context.folder / "data"
    if not folder.is_dir():
        plan = context.plan
        settings = Settings(
            val=plan["val_systems"],
            energy="relative",
            # A few frames are far from anything that a relaxation should meet.
            max_force=50.0,
            max_energy_above=10.0,
            max_atoms=plan["max_atoms"],
            max_frames=plan["frames_per_system"],
        )
        found = find_real_data(context.data, "oc20_trajectories", ORIGIN)
        from_ase([str(found / "*.traj")], folder, settings, workers=1)
    return folder


def make_runs(context: Context, _done: list[dict[str, Any]]) -> list[Run]:
    """Return all variants that train the same number of steps."""
    names = [name for name in read_yaml(HERE / "variants.yml") if name != EQUAL_TIME]
    return _runs(context, names, context.plan["steps"])


def make_equal_time_runs(context: Context, done: list[dict[str, Any]]) -> list[Run]:
    """Return the baseline with the number of steps that takes as long as DeNS."""
    return _runs(context, [EQUAL_TIME], round(context.plan["steps"] * time_ratio(done)))


def time_ratio(records: Sequence[dict[str, Any]]) -> float:
    """Return how much longer a training with DeNS takes: the ratio of the medians over seeds."""
    dens, baseline = (
        median(record["history"][-1]["seconds"] for record in select(records, variant=name))
        for name in ("dens", "baseline")
    )
    return dens / baseline


def _runs(context: Context, names: Sequence[str], steps: int) -> list[Run]:
    data = make_data(context)
    frames = read_summary(data)["splits"]["train"]["frames"]
    base = read_run_yaml(HERE / f"{context.scale}.yml")
    normalizer = read_yaml(data / "data.yml")["dataset"]["train"]["transforms"]["normalizer"]
    common = {
        "dataset": {
            "train": {"src": str(data / "train"), "transforms": {"normalizer": normalizer}},
            "val": {"src": str(data / "val")},
        },
        "optim": schedule(frames, base["optim"]["batch_size"], steps, context.plan["evaluations"]),
    }
    variants = read_yaml(HERE / "variants.yml")
    return [
        Run(
            variant=name,
            seed=seed,
            settings=merged(base, variants[name], common),
            after=train_force_mae,
            after_with={"train": str(data / "train"), "structures": 32},
        )
        for seed in context.seeds
        for name in names
    ]
