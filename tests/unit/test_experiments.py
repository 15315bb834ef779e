"""The machinery of the experiments: settings, schedules, records, statistics, and the faulty loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from checkout import see_experiments
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_loss import STD, fairchem_loss

see_experiments()

from experiments.common import runs as machinery  # noqa: E402  # the path comes first
from experiments.common.data import VARIABLE, find_real_data  # noqa: E402
from experiments.common.experiment import Context, Experiment, run_experiment, section  # noqa: E402
from experiments.common.runs import Run  # noqa: E402
from experiments.common.settings import merged, read_run_yaml, read_yaml, schedule  # noqa: E402
from experiments.common.statistics import Spread, curve, gains, last, select  # noqa: E402
from experiments.common.trainer import read_history  # noqa: E402
from experiments.oc20.runs import time_ratio  # noqa: E402

HERE = Path(machinery.__file__).parents[1]
NAMES = ("md17", "oc20", "generated", "denoising")


def record(variant: str, seed: int, *errors: float) -> dict[str, Any]:
    history = [
        {
            "step": 10 * (index + 1),
            "epoch": index + 1.0,
            "seconds": 2.0 * (index + 1) + seed,
            "forces_mae": error,
        }
        for index, error in enumerate(errors)
    ]
    return {"variant": variant, "seed": seed, "history": history}


def test_merged_replaces_lists_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": [1, 2], "c": 3}, "d": 4}
    assert merged(base, {"a": {"b": [5]}}, {"e": {"f": 6}}) == {
        "a": {"b": [5], "c": 3},
        "d": 4,
        "e": {"f": 6},
    }
    assert base == {"a": {"b": [1, 2], "c": 3}, "d": 4}


@pytest.mark.parametrize(
    ("frames", "steps", "evaluations"), [(48, 300, 4), (96, 300, 4), (50, 75, 3), (7, 1, 5)]
)
def test_the_last_step_is_evaluated(frames: int, steps: int, evaluations: int) -> None:
    made = schedule(frames, 8, steps, evaluations)
    total = made["max_epochs"] * math.ceil(frames / 8)
    assert total % made["eval_every"] == 0 and total // made["eval_every"] <= evaluations
    assert abs(total - steps) <= math.ceil(frames / 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["quick", "full"])
def test_yamls_and_plans_fit_together(name: str, scale: str) -> None:
    plan = read_yaml(HERE / name / "plan.yml")[scale]
    assert len(plan["seeds"]) >= 3
    settings = read_run_yaml(HERE / name / f"{scale}.yml")
    assert settings["trainer"] == "experiments.common.trainer.RecordingTrainer"
    assert settings["logger"] == "none" and settings["optim"]["batch_size"] > 0
    variants = read_yaml(HERE / name / "variants.yml")
    variants = variants.get(scale, variants)
    assert set(plan.get("sweep", [])) <= variants.keys()
    for variant in variants.values():
        losses = merged(settings, variant)["loss_functions"]
        corrupted = "dens" in variant.get("dataset", {}).get("train", {}).get("transforms", {})
        assert any("noise" in entry for entry in losses) == corrupted
        if corrupted:
            Corruption.from_config(variant["dataset"]["train"]["transforms"]["dens"])


def test_history_has_each_step_once(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    lines = [{"step": 10, "x": 1}, {"step": 20, "x": 2}, {"step": 20, "x": 3}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_history(file) == [{"step": 10, "x": 1}, {"step": 20, "x": 3}]
    assert read_history(tmp_path / "none") == []


def test_statistics_are_over_seeds() -> None:
    base = [record("baseline", seed, 4.0, 2.0 * seed) for seed in (1, 2, 3)]
    dens = [record("dens", seed, 4.0, 1.0 * seed) for seed in (3, 2, 1)]
    assert gains(dens, base, last("forces_mae")) == Spread(50.0, 0.0, 3)
    assert Spread.of([1.0, 3.0]).text() == "2.0 ± 1.4" and Spread.of([1.0]).text(2) == "1.00"
    places, means, low, high = curve(base, "forces_mae", "seconds", 10)
    assert places == [4.0, 6.0] and means == [40.0, 40.0] and low == [40.0, 20.0] and high == [40.0, 60.0]
    assert select([*base, *dens], variant="dens", seed=2) == [dens[1]]


def test_equal_time_is_measured() -> None:
    runs = [record("baseline", seed, 1.0, 1.0) for seed in (1, 2, 3)]
    runs += [record("dens", seed, *[1.0] * 4) for seed in (1, 2, 3)]
    # 4 s and the seed, 8 s and the seed: the medians are 6 and 10.
    assert time_ratio(runs) == pytest.approx(10 / 6)


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    run = Run(variant="dens", seed=1, settings={"optim": {"lr": 1}}, labels={"frames": 8})
    assert run.name == "8-dens-seed1" and machinery.finished(run, tmp_path) is None
    file = tmp_path / "runs" / run.name / "record.json"
    file.parent.mkdir(parents=True)
    made = {"name": run.name, "fingerprint": machinery.fingerprint(run)}
    file.write_text(json.dumps(made))
    assert machinery.run_all([run], tmp_path, jobs=1, cpu=True) == [made]
    changed = Run(variant="dens", seed=1, settings={"optim": {"lr": 2}}, labels={"frames": 8})
    assert machinery.finished(changed, tmp_path) is None


def test_results_say_what_is_missing(tmp_path: Path) -> None:
    runs = [Run(variant=name, seed=1, settings={}) for name in ("baseline", "dens")]
    experiment = Experiment(
        name="none", source=tmp_path, phases=(lambda _context, _done: runs,),
        draw=lambda _results, _folder: [], tell=lambda _results: "| table |", alts={},
    )  # fmt: skip
    context = Context("quick", tmp_path, {"seeds": [1]}, (1,), None)
    with pytest.raises(ValueError, match="No training is finished"):
        run_experiment(experiment, context, jobs=1, cpu=True, run=False)
    assert "was not run yet" in section(experiment, "quick")

    kept = record("dens", 1, 2.0) | {"name": runs[1].name, "fingerprint": machinery.fingerprint(runs[1])}
    kept["environment"] = {"commit": "abc", "device": "a CPU", "versions": {"torch": "2"}}
    (tmp_path / "runs" / runs[1].name).mkdir(parents=True)
    (tmp_path / "runs" / runs[1].name / "record.json").write_text(json.dumps(kept))
    results = run_experiment(experiment, context, jobs=1, cpu=True, run=False)
    assert results["trainings"] == {"planned": 2, "finished": 1} and results["commit"] == "abc"
    experiment.recorded("quick").parent.mkdir()
    experiment.recorded("quick").write_text(json.dumps(results))
    said = section(experiment, "quick")
    assert "These are 1 of its 2 trainings" in said and "| table |" in said and "a CPU" in said


def test_real_data_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="--data"):
        find_real_data(None, "rmd17", "revised MD17")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*revised MD17"):
        find_real_data(tmp_path, "rmd17", "revised MD17")
    (tmp_path / "rmd17").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert find_real_data(None, "rmd17", "") == tmp_path / "rmd17"


@pytest.mark.parametrize("all_corrupted", [True, False])
def test_the_faulty_loss_is_that_of_fairchem(
    run_settings, make_trainer, structure, all_corrupted: bool
) -> None:
    run_settings["trainer"] = "experiments.common.trainer.FairchemLossTrainer"
    run_settings["dataset"]["train"]["transforms"]["dens"] = {
        "prob": 1.0, "std": STD, "corrupt_ratio": 0.5, "switch": "batch"
    }  # fmt: skip
    trainer = make_trainer(run_settings)
    trainer.step = 1
    dens = Corruption(prob=1.0, std=STD, corrupt_ratio=0.5)
    batch = Batch.from_data_list(
        [corrupt(structure(seed), dens, seed=0, epoch=0, selected=all_corrupted) for seed in range(4)]
    )
    batch.energy = batch.energy.float()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(batch.num_nodes, 3, generator=generator)
    out = {"energy": torch.randn(4, 1, generator=generator), "forces": vectors}
    ours = trainer._compute_loss({**out, "noise": vectors}, batch)
    if all_corrupted:
        batch.denoising_pos_forward = True
    torch.testing.assert_close(ours, fairchem_loss(trainer, out, batch), rtol=1e-5, atol=0)
