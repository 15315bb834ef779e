"""`fairchem-dens submission is2rs`: a file of relaxed structures."""

from __future__ import annotations

import argparse

from fairchem_dens.cli.submission.relaxed import add_relaxation_arguments, run_relaxed
from fairchem_dens.submission.splits import IS2RS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add relaxations, or a checkpoint."""
    parser.description = (
        "Join relaxed positions (of all atoms, Å) of all test splits in one file for the leaderboard, and "
        "check it. Exit status 1 if something is wrong with them; nothing is written then."
    )
    add_relaxation_arguments(
        parser,
        "for each split the relaxed_positions.npz of 'fairchem --mode run-relaxations' with task.write_pos: "
        "True. With fairchem's own trainers, a run that went on after an interruption leaves out of it what "
        "it had relaxed before: give the folder of trajectories then, whose last frames are taken, with "
        "atoms wrapped into the cell.",
    )


def run(args: argparse.Namespace) -> int:
    """Relax where asked, build and check."""
    return run_relaxed(args, IS2RS)
