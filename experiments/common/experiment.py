"""The command of an experiment: data, trainings, results, figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.environment import environment
from experiments.common.runs import Run, run_all
from experiments.common.settings import read_yaml
from fairchem_dens.data.folder import write_text

SCALES = ("quick", "full")
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
        tell: returns the results as a table for people.
    """

    name: str
    source: Path
    phases: Sequence[Callable[[Context, list[dict[str, Any]]], list[Run]]]
    draw: Callable[[dict[str, Any], Path], list[Path]]
    tell: Callable[[dict[str, Any]], str]

    def recorded(self, scale: str) -> Path:
        """Where results that the documentation quotes are kept."""
        return self.source / "results" / f"{scale}.json"


def run_experiment(experiment: Experiment, context: Context, *, jobs: int, cpu: bool) -> dict[str, Any]:
    """Run what is left to run; return and write the results."""
    records: list[dict[str, Any]] = []
    for phase in experiment.phases:
        runs = phase(context, records)
        records += run_all(runs, context.folder, jobs=jobs, cpu=cpu)
    made_by = [record.pop("environment") for record in records]
    commits = sorted({str(made["commit"]) for made in made_by})
    results = {
        "experiment": experiment.name,
        "scale": context.scale,
        "command": f"python -m experiments.{experiment.name} --{context.scale}",
        **environment(cpu=cpu),
        "commit": commits[0] if len(commits) == 1 else commits,
        "seeds": list(context.seeds),
        "training_minutes": round(sum(record["history"][-1]["seconds"] for record in records) / 60, 2),
        "plan": context.plan,
        "runs": records,
    }
    write_text(context.folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of an experiment."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=sys.modules[experiment.tell.__module__].__doc__,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--quick", dest="scale", action="store_const", const="quick", help="minutes on CPUs (default)"
    )
    scale.add_argument("--full", dest="scale", action="store_const", const="full", help="for a GPU: hours")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: those of plan.yml")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the real data")
    parser.add_argument(
        "--out", type=Path, default=Path("experiment-output"), metavar="DIR", help="where to work"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at a time (default: one for each core)"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep results and figures where the docs read them"
    )
    parser.add_argument("--figures", action="store_true", help="draw the kept results, run nothing")
    parser.set_defaults(scale="quick")
    args = parser.parse_args(arguments)
    if args.figures:
        results = json.loads(experiment.recorded(args.scale).read_text(encoding="utf-8"))
        print(experiment.tell(results))
        for file in experiment.draw(results, DOCS_FIGURES):
            print(f"wrote {file}")
        return 0

    plan = read_yaml(experiment.source / "plan.yml")[args.scale]
    folder = args.out.absolute() / f"{experiment.name}-{args.scale}"
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(args.scale, folder, plan, tuple(args.seeds or plan["seeds"]), args.data)
    cpu = args.scale == "quick"
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if cpu else 1)
    started = time.monotonic()
    try:
        results = run_experiment(experiment, context, jobs=jobs, cpu=cpu)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(experiment.tell(results))
    figures = experiment.draw(results, folder)
    if args.record:
        experiment.recorded(args.scale).parent.mkdir(exist_ok=True)
        write_text(experiment.recorded(args.scale), (folder / RESULTS_FILE).read_text(encoding="utf-8"))
        figures += experiment.draw(results, DOCS_FIGURES)
    print(
        f"{(time.monotonic() - started) / 60:.1f} minutes; training took {results['training_minutes']} of them "
        "on each core together"
        if cpu
        else ""
    )
    for file in (folder / RESULTS_FILE, *figures):
        print(f"wrote {file}")
    return 0
