"""An experiment from data to figures, as small as can be."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from checkout import see_experiments

see_experiments()

from experiments.common.experiment import Context, run_experiment  # noqa: E402  # the path comes first
from experiments.generated.__main__ import EXPERIMENT  # noqa: E402

PLAN = {
    "sizes": [16],
    "sweep_size": 16,
    "sweep": ["fairchem_loss"],
    "steps": 4,
    "evaluations": 2,
    "val_systems": 2,
}


@pytest.mark.slow
def test_experiment_leaves_results_and_figures(tmp_path: Path) -> None:
    context = Context("quick", tmp_path, PLAN, (1,), None)
    results = run_experiment(EXPERIMENT, context, jobs=1, cpu=True)
    assert results["trainings"] == {"planned": 3, "finished": 3} and results["seeds"] == [1]
    assert results["versions"]["torch"] and results["device"] and results["commit"]
    for run in results["runs"]:
        assert [line["step"] for line in run["history"]] == [2, 4]
        assert 0 < run["history"][0]["seconds"] < run["history"][1]["seconds"]
        assert run["after"]["train_forces_mae"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["plan"] == PLAN

    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")}
    again = run_experiment(EXPERIMENT, context, jobs=1, cpu=True)
    assert again["runs"] == results["runs"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")} == written

    assert "loss of fairchem 1.10.0" in EXPERIMENT.tell(results)
    for file in EXPERIMENT.draw(results, tmp_path / "figures"):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
