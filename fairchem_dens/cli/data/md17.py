"""`fairchem-dens data md17`: the LMDBs of a molecule of MD17 or revised MD17, split as in the paper."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the molecule and the options."""
    parser.description = (
        "Make train, val and test LMDBs of a molecule of MD17 or revised MD17 (kcal/mol, kcal/mol/Å), split "
        "as in the paper, with normalisers of the train split and a YAML to include."
    )
    parser.add_argument(
        "molecule",
        metavar="MOLECULE",
        help=(
            "aspirin, benzene, ethanol, malonaldehyde, naphthalene, salicylic, toluene or uracil (the "
            "paper's), azobenzene or paracetamol"
        ),
    )
    parser.add_argument(
        "--labels",
        required=True,
        metavar="original|revised",
        help="energies and forces of MD17, which the paper uses, or of revised MD17; never mix them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make; configs/md17 looks for data/md17/MOLECULE",
    )
    parser.add_argument(
        "--npz",
        type=Path,
        metavar="FILE",
        help=(
            "the published .npz; that of revised MD17 holds both sets of labels (default: download it into "
            "'downloads' beside DIR)"
        ),
    )
    parser.add_argument(
        "--train-size",
        type=int,
        default=950,
        metavar="N",
        help="frames for training (default: 950); more than 1000 of a molecule are advised against",
    )
    parser.add_argument(
        "--val-size", type=int, default=50, metavar="N", help="frames for validation (default: 50)"
    )
    parser.add_argument(
        "--test-size",
        type=int,
        metavar="N",
        help="frames for the test (default: all others, as in the paper)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the split (default: 1, the paper's)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def run(args: argparse.Namespace) -> int:
    """Make the data set, say what was written and what to do next."""
    from fairchem_dens.data.md17 import MOST_TRAIN_FRAMES, make_md17

    if args.train_size > MOST_TRAIN_FRAMES:
        print(
            f"warning: MD17 should not be trained on more than {MOST_TRAIN_FRAMES} frames of a molecule "
            f"(--train-size {args.train_size}): frames of one trajectory are alike, and test errors then say "
            "little.",
            file=sys.stderr,
        )
    summary = make_md17(
        args.molecule,
        args.labels,
        args.out,
        npz=args.npz,
        train_size=args.train_size,
        val_size=args.val_size,
        test_size=args.test_size,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    split, source, offset = summary["split"], summary["source"], summary["energy_offset"]
    print(
        f"{args.out}: {summary['molecule']} ({summary['formula']}), {summary['labels']} labels, of "
        f"{source['frames']} frames train {split['train']}, val {split['val']}, test {split['test']}"
    )
    print(
        f"  energies in kcal/mol, counted from {offset:.0f}: total energy = energy + ({offset:.0f}); "
        f"train mean {summary['energy_mean']:.4f}, std {summary['energy_std']:.4f}\n"
        "  forces in kcal/mol/Å, divided by the same std; 1 kcal/mol = 43.3641 meV"
    )
    if summary["labels"] == "original" and source["published_as"] == "revised":
        print(
            "  the split is of the frames of a revised MD17 file: its frames are not those of the paper's "
            "split, which is of the original file"
        )
    print(
        "Look at it with `fairchem-dens data check`, then train with a YAML of configs/md17, or include "
        f"{args.out / 'data.yml'} in your own."
    )
    return 0
