"""Options that the commands on submissions share, and what they do with them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_dens.submission.splits import ALL_SPLITS, LEADERBOARDS, Task

if TYPE_CHECKING:
    from fairchem_dens.submission.runs import Running
    from fairchem_dens.submission.splits import Leaderboard


def add_build_arguments(parser: argparse.ArgumentParser, source: str, help_of_sources: str) -> None:
    """Add data set, output, results by split and LMDBs."""
    boards = "; ".join(f"{name} has the splits {', '.join(b.splits)}" for name, b in LEADERBOARDS.items())
    parser.add_argument(
        "--dataset", choices=list(LEADERBOARDS), required=True, help=f"whose leaderboard: {boards}"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.npz if it exists")
    group = parser.add_argument_group("results", help_of_sources)
    for split in ALL_SPLITS:
        group.add_argument(
            f"--{split.replace('_', '-')}",
            type=Path,
            dest=split,
            metavar=source,
            help=f"of the split {split}",
        )
    add_comparison_arguments(parser)


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the LMDBs that a file is compared with."""
    parser.add_argument(
        "--test-lmdbs",
        nargs="+",
        default=[],
        metavar="DIR",
        help=(
            "test LMDBs to compare ids and counts with: a folder that holds test_id, test_ood_ads, ... as "
            "the data sets come, or id=DIR ood_ads=DIR ...; without them neither can be checked"
        ),
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read LMDBs (default: 0, which is this one)",
    )


def add_checkpoint_arguments(
    parser: argparse.ArgumentParser, verb: str, mode: str
) -> argparse._ArgumentGroup:
    """Add the checkpoint that makes the results here; returns the group of options."""
    group = parser.add_argument_group(
        "results of a checkpoint",
        f"Instead of finished results: {verb} the test LMDBs here, on one GPU or the CPU. For more, run "
        f"'fairchem --mode {mode}' on each split.",
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="needs --test-lmdbs")
    group.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help=(
            "where the results of each split are kept; the same command goes on with what is not there "
            "(default: OUT.results beside OUT.npz)"
        ),
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="structures (default: that of evaluations in the checkpoint)",
    )
    group.add_argument("--amp", action="store_true", help="use mixed precision on a GPU")
    group.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    return group


def given_sources(args: argparse.Namespace) -> dict[str, Path]:
    """Return the results that were named, by split."""
    return {split: getattr(args, split) for split in ALL_SPLITS if getattr(args, split) is not None}


def lmdbs_of(args: argparse.Namespace, board: Leaderboard) -> dict[str, Path]:
    """Return the test LMDBs that were named, by split."""
    from fairchem_dens.submission.wanted import find_lmdbs

    return find_lmdbs(args.test_lmdbs, board)


def check_run(args: argparse.Namespace, lmdbs: Mapping[str, Path]) -> tuple[Path, Running]:
    """Check what is given with ``--checkpoint``; return the folder for the results and how to run.

    Raises:
        FileExistsError: OUT.npz exists.
        FileNotFoundError: its folder does not exist.
        ValueError: results are given as well, or no LMDBs.
    """
    from fairchem_dens.submission.build import check_output
    from fairchem_dens.submission.runs import Running

    check_output(args.out, overwrite=args.overwrite)
    if given_sources(args):
        raise ValueError(
            "'--checkpoint' makes the results of all splits: leave out those, or the checkpoint."
        )
    if not lmdbs:
        raise ValueError("'--checkpoint' needs structures: give --test-lmdbs.")
    running = Running(args.batch_size, args.workers, cpu=True if args.cpu else None, amp=args.amp)
    return args.results or args.out.with_suffix(".results"), running


def build(
    args: argparse.Namespace,
    task: Task,
    sources: Mapping[str, Path],
    lmdbs: Mapping[str, Path],
    *,
    cast: bool = False,
) -> int:
    """Build and check; print the report and what to do next.

    Returns:
        0, or 1 if something is wrong with the results; nothing is written then.
    """
    from fairchem_dens.submission.build import build_submission
    from fairchem_dens.submission.check import describe

    report = build_submission(
        args.out,
        LEADERBOARDS[args.dataset],
        task,
        sources,
        lmdbs=lmdbs,
        cast=cast,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    print(describe(report))
    if not report.healthy:
        print(f"\nsomething is wrong, see above; {args.out} was not written")
        return 1
    print(
        f"\nnothing is wrong\nwrote {args.out}: upload it to the {report.board.name} {task.name} leaderboard"
    )
    return 0
