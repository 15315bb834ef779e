"""The trainings of the experiment on denoising."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.data import generated_data, normalizers
from experiments.common.experiment import Context
from experiments.common.runs import Run
from experiments.common.settings import merged, read_run_yaml, read_yaml, schedule
from experiments.denoising.measure import noise_errors
from fairchem_dens.data.emt import EmtSettings

HERE = Path(__file__).parent
FRAMES_PER_SYSTEM = 4


def make_runs(context: Context, _done: list[dict[str, Any]]) -> list[Run]:
    """Return the four variants with each seed."""
    plan = context.plan
    data = context.folder / "data"
    summary = generated_data(
        data,
        EmtSettings(
            train_systems=plan["frames"] // FRAMES_PER_SYSTEM,
            val_systems=plan["val_systems"],
            test_systems=1,
            frames_per_system=FRAMES_PER_SYSTEM,
            seed=0,
        ),
    )
    base = read_run_yaml(HERE / f"{context.scale}.yml")
    common = {
        "dataset": {
            "train": {"src": str(data / "train"), "transforms": {"normalizer": normalizers(summary)}},
            "val": {"src": str(data / "val")},
        },
        "optim": schedule(plan["frames"], base["optim"]["batch_size"], plan["steps"], plan["evaluations"]),
    }
    given = {"val": str(data / "val"), **{key: plan[key] for key in ("levels", "level_of_bins", "bins")}}
    return [
        Run(
            variant=name,
            seed=seed,
            settings=merged(base, variant, common),
            after=noise_errors,
            after_with=given,
        )
        for seed in context.seeds
        for name, variant in read_yaml(HERE / "variants.yml").items()
    ]
