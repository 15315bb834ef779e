"""The campaign in short, and that it would notice what it looks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import checks
from .campaign import VARIANTS, Campaign, Variant, draw

KILLS = 8
TYPICAL = {"calls": {"step": 9000, "save": 900, "validation": 9000}, "phases": 40, "seconds": 0.1}


@pytest.mark.slow
def test_a_short_campaign(tmp_path: Path, run_settings: dict[str, Any]) -> None:
    """As `python -m tests.faults --kills 8 --spawned 1 --per-run 4` does, of two kinds of runs."""
    seed = 3
    print(f"seed {seed}")
    campaign = Campaign(tmp_path, run_settings, seed=seed, variants=(VARIANTS[0], VARIANTS[3]))
    tally = campaign.run(KILLS, spawned=1, per_run=4)
    report = tally.report()
    print({key: value for key, value in report.items() if key != "each"})
    assert not tally.problems()
    assert report["kills"] == KILLS and report["of_a_spawned_command"] >= 1
    assert report["resumes"] >= KILLS - 2, "runs were killed before there was anything to resume"


def test_the_same_seed_draws_the_same_strikes() -> None:
    def drawn(seed: int) -> list[Any]:
        return [draw(seed, n, VARIANTS[n % 4], TYPICAL, spawned=n % 9 == 0) for n in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    kinds = {strike.kind for strike in drawn(1)}
    assert kinds == {"call", "moment", "worker"}
    assert {strike.phase for strike in drawn(1) if strike.kind == "call"} == {"step", "save", "validation"}
    without_workers = [draw(1, n, Variant(0, "batch"), TYPICAL, spawned=False).kind for n in range(200)]
    assert "worker" not in without_workers


# ------------------------------------------------------------------ it would notice


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    """The files of two runs that are the same to the last bit."""
    state = {
        "state_dict": {"weight": torch.arange(4.0)},
        "ema": {"shadow_params": [torch.ones(3)]},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "step": 12,
    }
    for name in ("whole", "other"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in checks.CHECKPOINTS:
            torch.save(state | {"config": {"name": name}}, folder / file)
        (tmp_path / "results" / name).mkdir(parents=True)
        np.savez(tmp_path / "results" / name / "predictions.npz", energy=np.arange(3.0))
    return tmp_path


def spoilt(place: str, state: dict[str, Any]) -> None:
    if place == "state_dict.weight":
        weight = state["state_dict"]["weight"]
        weight[1] = torch.nextafter(weight[1], torch.tensor(9.0))
    elif place == "ema.shadow_params[0]":
        state["ema"]["shadow_params"][0][0] = 2
    elif place == "optimizer.state.0.exp_avg":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, dtype=torch.float64)
    elif place == "optimizer.param_groups[0].lr":
        state["optimizer"]["param_groups"][0]["lr"] = 0.2
    else:
        del state[place]


@pytest.mark.parametrize(
    "place",
    ["state_dict.weight", "ema.shadow_params[0]", "optimizer.state.0.exp_avg", "optimizer.param_groups[0].lr",
     "step"],
)  # fmt: skip
def test_one_bit_is_noticed(two_runs: Path, place: str) -> None:
    assert checks.mismatches(two_runs, "whole", "other") == []
    file = two_runs / "checkpoints" / "other" / "checkpoint.pt"
    state = checks.read(file)
    spoilt(place, state)
    torch.save(state, file)
    assert checks.mismatches(two_runs, "whole", "other") == [f"checkpoint.pt: {place}"]


def test_another_prediction_is_noticed(two_runs: Path) -> None:
    np.savez(two_runs / "results" / "other" / "predictions.npz", energy=np.array([0.0, 1.0, 2.5]))
    assert checks.mismatches(two_runs, "whole", "other") == ["predictions.npz: energy"]


def test_what_is_missing_is_noticed(two_runs: Path) -> None:
    (two_runs / "results" / "other" / "predictions.npz").unlink()
    (two_runs / "checkpoints" / "other" / "best_checkpoint.pt").unlink()
    missing = ["best_checkpoint.pt is missing", "predictions.npz is missing"]
    assert checks.mismatches(two_runs, "whole", "other") == missing


def test_lost_and_damaged_checkpoints_are_noticed(two_runs: Path) -> None:
    folder = two_runs / "checkpoints" / "other"
    now, wrong = checks.readable(folder, {})
    assert now == {"checkpoint.pt": 12, "best_checkpoint.pt": 12} and not wrong
    (folder / ".checkpoint.pt.aside-1").touch()
    assert checks.half_written(folder) == 1
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[:-20])
    (folder / "best_checkpoint.pt").unlink()
    _, wrong = checks.readable(folder, now)
    assert "checkpoint.pt cannot be read" in wrong[0]
    assert wrong[1] == "best_checkpoint.pt was there and is gone"
    shutil.copy(two_runs / "checkpoints" / "whole" / "checkpoint.pt", folder)
    _, wrong = checks.readable(folder, {"checkpoint.pt": 16})
    assert wrong == ["checkpoint.pt went back from step 16 to step 12"]
