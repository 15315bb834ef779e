"""`fairchem-dens checkpoint info`: say what is in a checkpoint and what a run can do with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the form of the answer."""
    parser.description = (
        "Say of each checkpoint, of any version and layout, which model it is of, how far it was trained, "
        "which normalisers it has, and whether a run can be resumed, fine-tuned or evaluated from it. No "
        "code in the file is run."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.pt", help="checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON, by file")


def run(args: argparse.Namespace) -> int:
    """Describe each file."""
    from fairchem_dens import checkpoints
    from fairchem_dens.checkpoints.describe import describe, text

    found = {str(file): describe(checkpoints.read_as_written(file)) for file in args.files}
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(text(file, description) for file, description in found.items()))
    return 0
