"""The command line of an experiment."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.common.experiment import DOCS_FIGURES, RESULTS_FILE, Context, Experiment, run_experiment
from experiments.common.settings import read_yaml
from fairchem_dens.data.folder import write_text


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run an experiment, or what is left of it, print its table and draw its figures."""
    args = _parser(experiment).parse_args(arguments)
    kept = experiment.recorded(args.scale)
    if args.figures:
        results = json.loads(kept.read_text(encoding="utf-8"))
        print(experiment.tell(results))
        _say_written(experiment.draw(results, DOCS_FIGURES))
        return 0
    plan = read_yaml(experiment.source / "plan.yml")[args.scale]
    folder = args.out.absolute() / f"{experiment.name}-{args.scale}"
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(args.scale, folder, plan, tuple(args.seeds or plan["seeds"]), args.data)
    cpu = args.scale == "quick"
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if cpu else 1)
    started = time.monotonic()
    try:
        results = run_experiment(experiment, context, jobs=jobs, cpu=cpu, run=not args.collect)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"python -m experiments.{experiment.name}: {error}", file=sys.stderr)
        return 1
    print(experiment.tell(results))
    written = [folder / RESULTS_FILE, *experiment.draw(results, folder)]
    if args.record:
        kept.parent.mkdir(exist_ok=True)
        write_text(kept, (folder / RESULTS_FILE).read_text(encoding="utf-8"))
        written += [kept, *experiment.draw(results, DOCS_FIGURES)]
    _say_written(written)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{minutes:.1f} minutes, {jobs} trainings at a time; they took {results['training_minutes']} in all"
    )
    return 0


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=sys.modules[f"experiments.{experiment.name}"].__doc__,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--quick", dest="scale", action="store_const", const="quick", help="minutes on CPUs (default)"
    )
    scale.add_argument("--full", dest="scale", action="store_const", const="full", help="for a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: those of plan.yml")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the real data")
    parser.add_argument(
        "--out", type=Path, default=Path("experiment-output"), metavar="DIR", help="where to work"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at a time (default: one for each core, or one)"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep results and figures where the documentation reads them"
    )
    parser.add_argument("--collect", action="store_true", help="take what is finished, run nothing")
    parser.add_argument("--figures", action="store_true", help="draw the kept results, run nothing")
    parser.set_defaults(scale="quick")
    return parser


def _say_written(files: Sequence[Path]) -> None:
    for file in files:
        print(f"wrote {file}")
