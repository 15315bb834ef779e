"""The trainings on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.data import first_frames, generated_data, normalizers
from experiments.common.evaluate import train_force_mae
from experiments.common.experiment import Context
from experiments.common.runs import Run
from experiments.common.settings import merged, read_run_yaml, read_yaml, schedule
from fairchem_dens.data.emt import EmtSettings

HERE = Path(__file__).parent
FRAMES_PER_SYSTEM = 4
SIZED = ("baseline", "dens")
"""Variants that are trained on every size; the others on ``sweep_size`` alone."""


def make_runs(context: Context, _done: list[dict[str, Any]]) -> list[Run]:
    """Return all trainings, sizes first."""
    plan = context.plan
    summary = generated_data(
        context.folder / "data",
        EmtSettings(
            train_systems=-(-max(plan["sizes"]) // FRAMES_PER_SYSTEM),
            val_systems=plan["val_systems"],
            test_systems=1,
            frames_per_system=FRAMES_PER_SYSTEM,
            seed=0,
        ),
    )
    variants = read_yaml(HERE / "variants.yml")
    wanted = [(size, name) for size in plan["sizes"] for name in SIZED]
    wanted += [(plan["sweep_size"], name) for name in plan["sweep"]]
    base = read_run_yaml(HERE / f"{context.scale}.yml")
    return [
        _run(context, base, variants[name], name, size, seed, normalizers(summary))
        for seed in context.seeds
        for size, name in wanted
    ]


def _run(
    context: Context,
    base: dict[str, Any],
    variant: dict[str, Any],
    name: str,
    size: int,
    seed: int,
    normalizer: dict[str, Any],
) -> Run:
    data = context.folder / "data"
    train = first_frames(data / "train", size, context.folder / "subsets" / str(size))
    settings = merged(
        base,
        variant,
        {
            "dataset": {
                "train": {"src": str(train), "transforms": {"normalizer": normalizer}},
                "val": {"src": str(data / "val")},
            },
            "optim": schedule(
                size, base["optim"]["batch_size"], context.plan["steps"], context.plan["evaluations"]
            ),
        },
    )
    return Run(
        variant=name,
        seed=seed,
        settings=settings,
        labels={"frames": size},
        after=train_force_mae,
        after_with={"train": str(train), "structures": 64},
    )
