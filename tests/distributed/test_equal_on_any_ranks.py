"""Loss, gradient and metrics of 2 and 4 ranks against those of one with the same global batch.

The model is an EquiformerV2 without grids, exactly equivariant: the frames of edges, which are drawn for each
rank anew, leave nothing behind. All is in double precision.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Data

import steps_on_ranks
from fairchem_dens.corruption import Corruption, corrupt
from model_cases import EQUIFORMER, ESCN

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 4)
CLOSE = 1e-9  # relative; double precision, sums of a few hundred terms in another order
MEASURED = {
    "loss", "energy_mae", "forces_mae", "forces_cosine_similarity", "forces_magnitude_error",
    "energy_forces_within_threshold", "denoising_energy_mae", "denoising_force_mae", "denoising_pos_mae",
    "grad_norm", "corrupted_share", "noise_std_A",
}  # fmt: skip

# What each of four ranks has, one letter for a structure. c: corrupted, o: ordinary; f: all its atoms are
# fixed and it is ordinary, F: all its atoms are fixed, and it is chosen to be corrupted.
SPLITS = {
    "mixed": ("co", "oc", "co", "oc"),
    "one rank has all the corrupted ones": ("ccc", "o", "o", "ooo"),
    "one rank has all the ordinary ones": ("o", "c", "cc", "c"),
    "none is corrupted": ("o", "oo", "o", "ooo"),
    "all are corrupted": ("cc", "c", "ccc", "c"),
    "a rank without a free atom": ("f", "co", "oo", "c"),
    "ranks of fixed atoms that were chosen": ("F", "fF", "oc", "o"),
    "mixed again": ("oc", "c", "o", "co"),
}
LOSSES: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate": {"noise": {"reduction": "separate"}},
    "all_atoms": {"dens": {"all_atoms": True}},
    "all_atoms, all displaced": {
        "dens": {"all_atoms": True, "corrupt_ratio": None},
        "noise": {"reduction": "separate"},
    },
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "EquiformerV2DeNS": {},
    "EquiformerV2DeNS, no force encoding": {"use_force_encoding": False},
    "EquiformerV2DeNS, no denoising energy": {"use_denoising_energy": False},
    "EquiformerV2DeNS, shown sigma": {"use_noise_schedule_sigma_encoding": True},
    "ESCNDeNS": ESCN,
    "EquiformerDeNS": EQUIFORMER,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


def steps(
    structure: Callable[..., Data], corruption: Corruption | None, dtype: torch.dtype = torch.float64
) -> list[list[list[Data]]]:
    """One step for each split, the structures made and corrupted."""
    made = []
    for number, split in enumerate(SPLITS.values()):
        ranks = []
        for rank, letters in enumerate(split):
            group = []
            for place, letter in enumerate(letters):
                seed = 1000 * number + 10 * rank + place
                natoms = 6 + seed % 5
                fixed = natoms if letter in "fF" else 2 + seed % 3
                data = structure(seed, natoms=natoms, num_fixed=fixed, dtype=dtype)
                data.energy = torch.tensor([data.energy], dtype=dtype)
                if corruption is not None:
                    data = corrupt(data, corruption, seed=0, epoch=0, selected=letter in "cF")
                group.append(data)
            ranks.append(group)
        made.append(ranks)
    return made


@pytest.fixture
def job(run_settings: dict[str, Any], structure: Callable[..., Data]) -> dict[str, Any]:
    """All runs, with and without DeNS."""
    run_settings["model"] |= {
        "use_gate_act": True, "use_grid_mlp": False, "alpha_drop": 0.0, "drop_path_rate": 0.0,
    }  # fmt: skip
    # The schedule follows from the number of batches on a rank, so steps are too small to change anything.
    run_settings["optim"] |= {"optimizer": "SGD", "optimizer_params": {}, "lr_initial": 1e-14}
    run_settings["optim"] |= {"max_epochs": 1, "clip_grad_norm": 1e9}
    del run_settings["dataset"]["val"], run_settings["dataset"]["test"]
    metrics = ["mae", "cosine_similarity", "magnitude_error", "energy_forces_within_threshold"]
    run_settings["evaluation_metrics"]["metrics"]["forces"] = metrics
    runs = {}
    for name, loss in LOSSES.items():
        settings = copy.deepcopy(run_settings)
        dens = settings["dataset"]["train"]["transforms"]["dens"]
        dens |= loss.get("dens", {})
        settings["loss_functions"][2]["noise"] |= loss.get("noise", {})
        made = steps(structure, Corruption.from_config(dens))
        runs[name] = {"settings": settings, "worlds": WORLDS, "steps": made, "evaluation": []}
    plain = copy.deepcopy(run_settings)
    del plain["dataset"]["train"]["transforms"]["dens"], plain["loss_functions"][2]
    made = steps(structure, None)
    runs["without DeNS"] = {"settings": plain, "worlds": WORLDS, "steps": made, "evaluation": made}
    for name, changes in ABLATIONS.items():
        settings = copy.deepcopy(run_settings)
        model = {} if changes in (ESCN, EQUIFORMER) else settings["model"]
        settings["model"] = {**model, **changes, "name": f"fairchem_dens.models.{name.split(',')[0]}"}
        made = steps(structure, Corruption.from_config(settings["dataset"]["train"]["transforms"]["dens"]))
        runs[name] = {"settings": settings, "worlds": (2,), "steps": made[1:5], "evaluation": []}
    return runs


@pytest.fixture
def results(job: dict[str, Any], folder: Path) -> Callable[[str, int], list[dict[str, Any]]]:
    """What the ranks of a run left; the processes run once for this file."""
    if not (folder / "finished").exists():
        torch.save(job, folder / "job.pt")
        done = subprocess.run(
            [sys.executable, steps_on_ranks.__file__, "job.pt", str(folder)],
            cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        (folder / "finished").touch()

    def of(name: str, world: int) -> list[dict[str, Any]]:
        return [torch.load(folder / f"{name}.{world}.{rank}.pt") for rank in range(world)]

    return of


def metrics_of_steps(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged in training, step by step."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in logged:
        if entry["split"] == "train":
            by_step.setdefault(entry["step"], {}).update(entry)
    return [by_step[step] for step in sorted(by_step)]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", [*LOSSES, "without DeNS"])
def test_loss_gradient_and_metrics_are_those_of_one_rank(results: Any, name: str, world: int) -> None:
    (one,), ranks = results(name, 1), results(name, world)
    expected, got = metrics_of_steps(one["logged"]), metrics_of_steps(ranks[0]["logged"])
    assert len(expected) == len(got) == len(SPLITS)
    names = set().union(*expected)
    assert {"loss", "energy_mae", "forces_mae", "forces_cosine_similarity"} < names
    if name != "without DeNS":
        assert {"denoising_energy_mae", "denoising_pos_mae"} < names
    for split, ours, theirs in zip(SPLITS, expected, got, strict=True):
        assert ours.keys() == theirs.keys(), split
        for metric in MEASURED & ours.keys():
            assert theirs[metric] == pytest.approx(ours[metric], rel=CLOSE, abs=1e-12), (split, metric)
    for rank in ranks:
        for split, ours, theirs in zip(SPLITS, one["gradients"], rank["gradients"], strict=True):
            largest = max(gradient.abs().max() for gradient in ours.values())
            assert largest > 1e-3
            for parameter, gradient in ours.items():
                difference = (theirs[parameter] - gradient).abs().max()
                assert difference < CLOSE * largest, (split, parameter)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_validation_metrics_are_those_of_one_rank_on_all_ranks(results: Any, world: int) -> None:
    (one,), ranks = results("without DeNS", 1), results("without DeNS", world)
    assert {"loss", "energy_mae", "forces_mae", "energy_forces_within_threshold"} < one["evaluated"].keys()
    for rank in ranks:
        assert rank["evaluated"] == ranks[0]["evaluated"]  # the ranks decide alike what is the best so far
        assert rank["evaluated"] == pytest.approx(one["evaluated"], rel=CLOSE, abs=1e-12)


@pytest.mark.parametrize("name", ABLATIONS)
def test_no_parameter_is_without_gradient(results: Any, name: str) -> None:
    """Neither with nor without corrupted structures: DDP would refuse the next step."""
    first, second = results(name, 2)
    assert len(first["gradients"]) == 4
    for ours, theirs in zip(first["gradients"], second["gradients"], strict=True):
        for parameter, gradient in ours.items():
            assert torch.equal(gradient, theirs[parameter]), parameter
