"""`fairchem-dens data fit-stats`: fit normalisers and element references to a data set."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the output and what to fit."""
    parser.description = (
        "Fit the normalisers of energies and forces, and per-element references if asked, to the train split "
        "of a data set. Energies: mean and rmsd; forces: mean 0 and the rms of the components on free atoms."
    )
    parser.add_argument("source", metavar="SRC", help="a folder of LMDBs, an LMDB file, or the YAML of a run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR|FILE.yml",
        help=(
            "a folder to make, with data.yml to include and the numbers as .npz; or just the YAML, with "
            "fitted references beside it"
        ),
    )
    parser.add_argument(
        "--references",
        default="none",
        metavar="none|fit|FILE",
        help=(
            "per-element references that are subtracted from energies: none (default), fitted to the data, "
            "or those of an .npz"
        ),
    )
    from fairchem_dens.cli.data.check import add_reading_arguments

    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, write, and say what was written."""
    from fairchem_dens.data.fit import fit_and_write
    from fairchem_dens.data.inspect import inspect
    from fairchem_dens.data.source import find_source

    source = find_source(args.source, args.split)
    inspection = inspect(source, sample=args.sample, workers=args.workers)
    for line in fit_and_write(inspection, args.out, references=args.references):
        print(line)
    return 0
