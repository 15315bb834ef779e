"""`fairchem-dens data check`: open a data set as training does and say what is in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SAMPLE = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sources and the options."""
    parser.description = (
        "Open data sets as training does and report what is in them, what is wrong with them, and the "
        "normaliser values to paste into a YAML. Exit status 1 if something is wrong."
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="a folder of LMDBs, an LMDB file, or the YAML of a run; several are compared, as train and val",
    )
    add_reading_arguments(parser)
    parser.add_argument("--all", action="store_true", help="list all wrong records, not the first 20")
    parser.add_argument(
        "--write-metadata",
        action="store_true",
        help="read all structures and write metadata.npz where it is missing or wrong",
    )
    parser.add_argument(
        "--histograms", type=Path, metavar="FILE.png", help="draw sizes, energies, forces and elements"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is read of a source, and by how many."""
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="which split of a YAML (default: train)",
    )
    parser.add_argument(
        "--sample",
        type=sample_size,
        default=SAMPLE,
        metavar="N",
        help=f"structures to read, evenly spread, or 'all' (default: {SAMPLE})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read (default: 0, which is this one)",
    )


def sample_size(text: str) -> int | None:
    """Read the value of ``--sample``."""
    if text == "all":
        return None
    count = int(text) if text.isdigit() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, or 'all', found {text!r}")
    return count


def _check_outputs(histograms: Path | None, report: Path | None) -> None:
    """Refuse what cannot be written, before everything is read."""
    if histograms is not None and histograms.suffix != ".png":
        raise ValueError(f"'--histograms {histograms}' must end in .png.")
    for option, file in (("--histograms", histograms), ("--json", report)):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"'{option} {file}': there is no folder '{file.parent}'.")


def run(args: argparse.Namespace) -> int:
    """Report on each source, and on all of them together."""
    from fairchem_dens.data.folder import write_text
    from fairchem_dens.data.inspect import inspect
    from fairchem_dens.data.label_kinds import compare
    from fairchem_dens.data.metadata import write_metadata
    from fairchem_dens.data.report import as_data, describe, describe_findings
    from fairchem_dens.data.source import find_source

    _check_outputs(args.histograms, args.json)
    sources = [find_source(name, args.split) for name in args.sources]
    sample = None if args.write_metadata else args.sample
    inspections, written = [], []
    for source in sources:
        inspection = inspect(source, sample=sample, workers=args.workers)
        file = write_metadata(inspection) if args.write_metadata else None
        written += [file] if file is not None else []
        inspections.append(inspection)
        print(describe(inspection, shown=None if args.all else 20), end="\n\n")
    together = compare(inspections)
    if together:
        print(describe_findings(together), end="\n\n")
    if args.histograms is not None:
        from fairchem_dens.data.histograms import draw

        draw(args.histograms, inspections)
        written.append(args.histograms)
    if args.json is not None:
        report = {
            "sources": [as_data(inspection) for inspection in inspections],
            "together": [vars(finding) for finding in together],
        }
        write_text(args.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        written.append(args.json)
    for file in written:
        print(f"wrote {file}")
    healthy = not together and all(inspection.healthy for inspection in inspections)
    print("nothing is wrong" if healthy else "something is wrong, see above")
    return 0 if healthy else 1
