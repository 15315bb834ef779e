"""What the two submissions of relaxations share."""

from __future__ import annotations

import argparse

from fairchem_dens.cli.submission.options import (
    add_build_arguments,
    add_checkpoint_arguments,
    build,
    check_run,
    given_sources,
    lmdbs_of,
)
from fairchem_dens.submission.splits import LEADERBOARDS, Task


def add_relaxation_arguments(parser: argparse.ArgumentParser, help_of_sources: str) -> None:
    """Add the results of relaxations, or the checkpoint that makes them."""
    add_build_arguments(parser, "PATH", help_of_sources)
    group = add_checkpoint_arguments(parser, "relax", "run-relaxations")
    group.add_argument(
        "--relaxation-steps", type=int, default=300, metavar="N", help="at most so many (default: 300)"
    )
    group.add_argument(
        "--relaxation-fmax",
        type=float,
        default=0.02,
        metavar="F",
        help="relax until no force on a free atom is larger, eV/Å (default: 0.02)",
    )


def run_relaxed(args: argparse.Namespace, task: Task) -> int:
    """Relax where asked, build and check."""
    board = LEADERBOARDS[args.dataset]
    lmdbs, sources = lmdbs_of(args, board), given_sources(args)
    if args.checkpoint is not None:
        results, running = check_run(args, lmdbs)
        from fairchem_dens.submission.runs import Relaxation, relax_splits

        relaxation = Relaxation(args.relaxation_steps, args.relaxation_fmax)
        sources = relax_splits(args.checkpoint, board, task, lmdbs, results, running, relaxation)
    return build(args, task, sources, lmdbs)
