"""`fairchem-dens data references`: convert per-element references, refusing what the data cannot use."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, the output and the data."""
    parser.description = (
        "Convert per-element linear references (an .npz with 'coeff', eV by atomic number) to a file for "
        "fairchem's element_references in which elements without a usable coefficient are NaN: a run on them "
        "fails instead of predicting nonsense. With --data, refuse a file that lacks an element of the data."
    )
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="the references")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="the file to write")
    parser.add_argument(
        "--data",
        metavar="SRC",
        help="what they are for: a folder of LMDBs, an LMDB file or the YAML of a run",
    )
    from fairchem_dens.cli.data.check import add_reading_arguments

    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert the file and say which elements it cannot be used for."""
    import numpy as np

    from fairchem_dens.data.references import convert, describe_elements, symbol, usable

    elements = None
    if args.data is not None:
        from fairchem_dens.data.inspect import inspect
        from fairchem_dens.data.source import find_source

        inspection = inspect(find_source(args.data, args.split), sample=args.sample, workers=args.workers)
        elements = inspection.statistics.elements
        print(f"{inspection.statistics.read} of {inspection.total} structures were read.")
    coefficients = convert(args.file, args.out, elements)
    known = usable(coefficients)
    refused = [number for number in range(1, len(known)) if not known[number]]
    print(f"wrote {args.out}: references of {int(known[1:].sum())} elements, NaN for all others")
    absurd = [number for number in refused if coefficients[number] != 0]
    if absurd:
        print(f"absurd coefficients, not used: {describe_elements(absurd, coefficients)}")
    zeros = [symbol(number) for number in refused if coefficients[number] == 0]
    if zeros:
        print(f"coefficient 0, which is none: {', '.join(zeros)}")
    sizes = np.abs(np.where(known, coefficients, 0.0))
    doubtful = (
        np.flatnonzero(sizes > 10 * np.median(sizes[known])) if known.any() else np.array([], dtype=int)
    )
    if len(doubtful):
        print(f"kept, but far larger than the others: {describe_elements(doubtful, coefficients)}")
    print(
        "Use it in a YAML:\n  dataset:\n    train:\n      transforms:\n        element_references:\n"
        f"          energy: {{file: {args.out.absolute()}}}"
    )
    return 0
