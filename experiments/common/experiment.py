"""An experiment: its runs, its results as a file, and what the documentation shows of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.runs import Run, finished, run_all
from fairchem_dens.data.folder import write_text

RESULTS_FILE = "results.json"
DOCS_FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


@dataclass(frozen=True)
class Context:
    """What an experiment is told.

    Attributes:
        scale: ``quick`` or ``full``.
        folder: of the experiment's data and runs.
        plan: its part of ``plan.yml``.
        seeds: of the runs.
        data: folder with real data, if one was named.
    """

    scale: str
    folder: Path
    plan: dict[str, Any]
    seeds: tuple[int, ...]
    data: Path | None


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: of its folder.
        source: that folder.
        phases: each gives runs, from the records of those before.
        draw: draws the figures from what was written as results, into a folder; returns their files.
        tell: returns the results as a Markdown table.
        alts: what a figure shows, by the start of its file's name, for those who do not see it.
    """

    name: str
    source: Path
    phases: Sequence[Callable[[Context, list[dict[str, Any]]], list[Run]]]
    draw: Callable[[dict[str, Any], Path], list[Path]]
    tell: Callable[[dict[str, Any]], str]
    alts: Mapping[str, str]

    def recorded(self, scale: str) -> Path:
        """Where results that the documentation quotes are kept."""
        return self.source / "results" / f"{scale}.json"


def run_experiment(
    experiment: Experiment, context: Context, *, jobs: int, cpu: bool, run: bool = True
) -> dict[str, Any]:
    """Run what is left to run; return and write the results.

    Args:
        experiment: which.
        context: what it is told.
        jobs: trainings at the same time.
        cpu: whether to leave a GPU alone.
        run: False takes what is finished, and says how much that is.

    Raises:
        ValueError: nothing is finished.
    """
    records: list[dict[str, Any]] = []
    planned = 0
    for phase in experiment.phases:
        if len(records) < planned:  # what comes next needs all of what was before
            break
        runs = phase(context, records)
        planned += len(runs)
        if run:
            records += run_all(runs, context.folder, jobs=jobs, cpu=cpu)
        else:
            found = (finished(one, context.folder) for one in runs)
            records += [record for record in found if record is not None]
    if not records:
        raise ValueError(f"No training is finished in '{context.folder}': run it without --collect.")
    made_by = [record.pop("environment") for record in records]
    commits = sorted({str(made["commit"]) for made in made_by})
    results = {
        "experiment": experiment.name,
        "scale": context.scale,
        "command": f"python -m experiments.{experiment.name} --{context.scale}",
        **made_by[-1],
        "commit": commits[0] if len(commits) == 1 else commits,
        "seeds": sorted({record["seed"] for record in records}),
        "trainings": {"planned": planned, "finished": len(records)},
        "training_minutes": round(sum(record["history"][-1]["seconds"] for record in records) / 60, 2),
        "plan": context.plan,
        "runs": records,
    }
    write_text(context.folder / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def section(experiment: Experiment, scale: str) -> str:
    """Return what the documentation shows of the kept results: origin, table and figures, as Markdown."""
    file = experiment.recorded(scale)
    if not file.is_file():
        return f"`python -m experiments.{experiment.name} --{scale}` was not run yet."
    results = json.loads(file.read_text(encoding="utf-8"))
    planned, done = (results["trainings"][key] for key in ("planned", "finished"))
    partly = ""
    if done < planned:
        partly = f" **These are {done} of its {planned} trainings**; the others were not run yet."
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"`{results['command']}`; seeds {seeds}; {results['device']}; torch {results['versions']['torch']}; "
        f"{results['training_minutes']:.1f} minutes of training in all.{partly}",
        "",
        experiment.tell(results),
    ]
    for start, alt in experiment.alts.items():
        if (DOCS_FIGURES / f"{start}_{scale}.svg").is_file():
            lines += ["", f"![{alt}](figures/{start}_{scale}.svg)"]
    return "\n".join(lines)
