"""`fairchem-dens data from-ase`: own trajectories and databases as train, val and test LMDBs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_DESCRIPTION = """\
Turn files that ASE reads (traj, extxyz, db, vasprun.xml, OUTCAR, aselmdb, ...) into train, val and test
LMDBs, with normalisers of the train split and a YAML to include.

Energies must be in eV and forces in eV/Å, as ASE gives them. Both are needed: DeNS shows the model the
forces. An interrupted command goes on where it was when it is given again; until then, what it has read is
in the hidden folder .NAME.partial beside DIR.
"""

_EPILOG = """\
what a system is:
  Frames of one system are alike, so they never land in two splits. --split-by says what belongs together:
    system         the frame's own 'sid' or 'system' (in its info, or its row's key-value pairs or data); else
                   the file, if it holds several frames; else, for rows of a database and files of a single
                   frame, the chemical formula (default)
    file           the file
    formula        the chemical formula
    key:NAME       field NAME of the frame
    regex:PATTERN  what the pattern's first group (or the whole pattern) finds in the file's absolute path
  A file is called by its name without suffix, OUTCAR and vasprun.xml by that of their folder, with as many
  folders before it as tell it from the other files.
  In the LMDBs, sid is the number in the system's name if every name has one of its own (random1000100 or
  1000100), else the name; fid is the frame's own 'fid' or its number in the file (in a database, the row's
  id), counted on where a rule joins several files.

example:
  fairchem-dens data from-ase 'runs/**/*.traj' --out data/own --energy relative --max-force 50 \\
    --max-energy-above 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    from fairchem_dens.data.from_ase.settings import ENERGIES, FIXED, REFERENCE_FRAMES, TAGS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="files, folders, or patterns in quotes; ** is any number of folders",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (needed without --dry-run)")
    parser.add_argument("--format", metavar="NAME", help="ASE's name of the files' format (default: by file)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read (default: up to 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--dry-run", action="store_true", help="read everything, report, write nothing")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files that cannot be read, and name them"
    )
    parser.add_argument(
        "--frames-per-file", type=int, metavar="N", help="frames in an LMDB file (default: one file a split)"
    )

    splits = parser.add_argument_group("splits")
    splits.add_argument("--split-by", default="system", metavar="RULE", help="see below (default: system)")
    splits.add_argument(
        "--val",
        type=_size,
        default=0.1,
        metavar="SIZE",
        help="share of the systems (0.1) or their number (3) for validation (default: 0.1)",
    )
    splits.add_argument(
        "--test", type=_size, default=0.0, metavar="SIZE", help="the same for the test (default: 0)"
    )
    splits.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")

    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--energy",
        choices=ENERGIES,
        default="total",
        help=(
            "total: as in the files; relative: less the energy of the system's reference frame; referenced: "
            "total in the LMDBs, with references by element, fitted to train, that training takes off and "
            "prediction puts back (default: total)"
        ),
    )
    labels.add_argument(
        "--relative-to",
        choices=REFERENCE_FRAMES,
        default="last",
        help="reference frame of a system, among all its frames (default: last)",
    )
    labels.add_argument(
        "--energy-key", default="energy", metavar="NAME", help="name of the energy in the files"
    )
    labels.add_argument(
        "--forces-key", default="forces", metavar="NAME", help="name of the forces in the files"
    )
    labels.add_argument(
        "--tags",
        choices=TAGS,
        default="auto",
        help=(
            "file: as there; rule: 0 for fixed atoms, 2 for free ones of --adsorbate-elements, 1 for other "
            "free ones; auto: file where a tag is not 0, else rule; none: all 0 (default: auto)"
        ),
    )
    labels.add_argument(
        "--adsorbate-elements",
        default="H,C,N,O",
        metavar="LIST",
        help="for the rule of --tags (default: H,C,N,O)",
    )
    labels.add_argument(
        "--fixed",
        choices=FIXED,
        default="file",
        help="file: atoms that a constraint holds in x, y and z; none: no atom (default: file)",
    )

    filters = parser.add_argument_group("filters, all off by default")
    filters.add_argument(
        "--max-force", type=float, metavar="F", help="eV/Å; leave out frames with a larger one on any atom"
    )
    filters.add_argument(
        "--max-energy-above",
        type=float,
        metavar="E",
        help="eV; leave out frames that far above the reference frame of their system",
    )
    filters.add_argument("--max-atoms", type=int, metavar="N", help="leave out frames with more atoms")
    filters.add_argument(
        "--min-distance", type=float, metavar="D", help="Å; leave out frames with atoms closer than this"
    )
    filters.add_argument(
        "--skip-first", type=int, default=0, metavar="N", help="leave out the first frames of each system"
    )
    filters.add_argument(
        "--every", type=int, default=1, metavar="N", help="of the others, take one in N (default: 1)"
    )
    filters.add_argument(
        "--max-frames",
        type=int,
        metavar="N",
        help="of each system, evenly spread over what the other filters left",
    )


def _size(text: str) -> float | int:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def run(args: argparse.Namespace) -> int:
    """Make the data set and report; returns 0, or 130 if it was interrupted."""
    from fairchem_dens.data.from_ase.convert import from_ase
    from fairchem_dens.data.from_ase.report import describe
    from fairchem_dens.data.from_ase.settings import Settings

    if args.out is None and not args.dry_run:
        raise ValueError("'--out DIR' is missing: give the folder to make, or --dry-run to write nothing.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"'--workers' must be at least 1, found {args.workers}.")
    chosen = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    chosen["adsorbate_elements"] = tuple(filter(None, args.adsorbate_elements.split(",")))
    settings = Settings(**chosen)
    try:
        summary = from_ase(
            args.patterns,
            None if args.dry_run else args.out,
            settings,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    print("\n".join(describe(summary)))
    print("\n" + (_next(args.out) if not args.dry_run else "Nothing was written (--dry-run)."))
    return 0


def _next(out: Path) -> str:
    return f"""\
wrote {out}/: {", ".join(sorted(path.name for path in out.iterdir()))}

Look at it:
  fairchem-dens data check {out}/train

Train on it, after setting depth, batch, learning rate and epochs in {out}/train.yml to your data:
  fairchem --mode train --config-yml {out}/train.yml --run-dir runs"""
