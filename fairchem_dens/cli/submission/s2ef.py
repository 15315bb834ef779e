"""`fairchem-dens submission s2ef`: a file of energies and forces."""

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
from fairchem_dens.submission.splits import LEADERBOARDS, S2EF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add predictions, or the checkpoint that makes them."""
    parser.description = (
        "Join predictions of energies and forces for all test splits in one file for the leaderboard, and "
        "check it. Exit status 1 if something is wrong with them; nothing is written then."
    )
    add_build_arguments(
        parser,
        "FILE",
        "s2ef_predictions.npz of 'fairchem --mode predict', for each split of the data set",
    )
    parser.add_argument(
        "--cast",
        action="store_true",
        help="convert forces of higher precision to the leaderboard's (OC20: float16)",
    )
    add_checkpoint_arguments(parser, "predict", "predict")


def run(args: argparse.Namespace) -> int:
    """Predict where asked, build and check."""
    board = LEADERBOARDS[args.dataset]
    lmdbs, sources = lmdbs_of(args, board), given_sources(args)
    if args.checkpoint is not None:
        results, running = check_run(args, lmdbs)
        from fairchem_dens.submission.runs import predict_splits

        sources = predict_splits(args.checkpoint, board, lmdbs, results, running)
    return build(args, S2EF, sources, lmdbs, cast=args.cast)
