"""`fairchem-dens submission is2re`: a file of relaxed energies."""

from __future__ import annotations

import argparse

from fairchem_dens.cli.submission.relaxed import add_relaxation_arguments, run_relaxed
from fairchem_dens.submission.splits import IS2RE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add relaxations, predictions of energies, or a checkpoint."""
    parser.description = (
        "Join relaxed energies of all test splits in one file for the leaderboard, and check it. Exit status "
        "1 if something is wrong with them; nothing is written then."
    )
    add_relaxation_arguments(
        parser,
        "for each split the folder of trajectories of 'fairchem --mode run-relaxations' (task.relax_opt."
        "traj_dir), whose last energies are taken; or the .npz of 'fairchem --mode predict', of initial "
        "structures by a model of relaxed energies, or of relaxed structures by one of energies and forces.",
    )


def run(args: argparse.Namespace) -> int:
    """Relax where asked, build and check."""
    return run_relaxed(args, IS2RE)
