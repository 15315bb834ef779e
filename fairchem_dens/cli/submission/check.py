"""`fairchem-dens submission check`: check a file from anywhere before it is uploaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairchem_dens.cli.submission.options import add_comparison_arguments, lmdbs_of
from fairchem_dens.submission.splits import LEADERBOARDS, TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file and what it is for."""
    parser.description = (
        "Check a submission: arrays, types, ids, finite values and, against test LMDBs, that each structure "
        "is there once with the right number of atoms. Nothing in the file is ever executed. Exit status 1 "
        "if something is wrong."
    )
    parser.add_argument("file", type=Path, metavar="FILE.npz")
    told = "(default: told by the names of the arrays)"
    parser.add_argument("--dataset", choices=list(LEADERBOARDS), help=f"whose leaderboard {told}")
    parser.add_argument("--task", choices=list(TASKS), help=f"what is predicted {told}")
    add_comparison_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check, and print the report."""
    from fairchem_dens.submission.arrays import names_of
    from fairchem_dens.submission.check import check_submission, describe
    from fairchem_dens.submission.splits import guess

    names = names_of(args.file)
    board, task = LEADERBOARDS.get(args.dataset), TASKS.get(args.task)
    if board is None or task is None:
        guessed_board, guessed_task = guess(names)
        board, task = board or guessed_board, task or guessed_task
    report = check_submission(args.file, board, task, lmdbs=lmdbs_of(args, board), workers=args.workers)
    print(describe(report))
    print("\nnothing is wrong" if report.healthy else "\nsomething is wrong, see above")
    return 0 if report.healthy else 1
