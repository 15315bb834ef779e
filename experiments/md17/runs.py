"""The trainings on real MD17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.data import find_real_data
from experiments.common.evaluate import train_force_mae
from experiments.common.experiment import Context
from experiments.common.runs import Run
from experiments.common.settings import merged, read_run_yaml, read_yaml, schedule
from fairchem_dens.data.md17 import make_md17

HERE = Path(__file__).parent
ORIGIN = "the revised MD17 files, which hold the original labels too, arXiv 2007.09593"
KCAL_PER_MOL = 43.3641
"""meV; fairchem logs the units of the data."""


def make_data(context: Context, molecule: str) -> Path:
    """Write the LMDBs of a molecule, unless they are there; return their folder."""
    folder = context.folder / "data" / molecule
    if not folder.is_dir():
        npz = find_real_data(context.data, f"rmd17/rmd17_{molecule}.npz", ORIGIN)
        # One permutation, cut at other places: the smaller training set is the start of the paper's.
        make_md17(
            molecule,
            "original",
            folder,
            npz=npz,
            train_size=context.plan["train_size"],
            val_size=50,
            test_size=context.plan["measured"],
            seed=1,
        )
    return folder


def make_runs(context: Context, _done: list[dict[str, Any]]) -> list[Run]:
    """Return both variants on each molecule with each seed."""
    plan = context.plan
    base = read_run_yaml(HERE / f"{context.scale}.yml")
    variants = read_yaml(HERE / "variants.yml")[context.scale]
    per_epoch = -(-plan["train_size"] // base["optim"]["batch_size"])
    timing = schedule(
        plan["train_size"], base["optim"]["batch_size"], plan["epochs"] * per_epoch, plan["evaluations"]
    )
    runs = []
    for molecule in plan["molecules"]:
        data = make_data(context, molecule)
        normalizer = read_yaml(data / "data.yml")["dataset"]["train"]["transforms"]["normalizer"]
        common = {
            "dataset": {
                "train": {"src": str(data / "train"), "transforms": {"normalizer": normalizer}},
                # Nothing is chosen by these errors: the last step of each run is what is reported.
                "val": {"src": str(data / "test")},
            },
            "optim": timing,
        }
        runs += [
            Run(
                variant=name,
                seed=seed,
                settings=merged(base, variant, common),
                labels={"molecule": molecule},
                after=train_force_mae,
                after_with={"train": str(data / "train"), "structures": 32},
            )
            for seed in context.seeds
            for name, variant in variants.items()
        ]
    return runs
