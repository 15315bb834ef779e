"""`fairchem-dens evaluate`: score a checkpoint on labelled data."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairchem_dens.evaluation.scorecard import Scorecard

_SCORECARD = "scorecard"
_PLOT = "parity.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is scored, on what, and where the scorecard goes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Score a checkpoint on labelled data by the metrics of the OC20 leaderboards: energy MAE in meV,\n"
        "force MAE in meV/Å, force cosine and EFwT, of each split and their mean, beside the paper's.\n"
        "Weights are the moving average where the checkpoint has one.\n"
        "\n"
        "  fairchem-dens evaluate --checkpoint best_checkpoint.pt --out scores \\\n"
        "    --splits id=data/val_id ood_ads=data/val_ood_ads ood_cat=data/val_ood_cat \\\n"
        "      ood_both=data/val_ood_both\n"
        "\n"
        "Energies of relaxed structures (IS2RE) are scored with --relaxed, against the labels 'y_relaxed':\n"
        "\n"
        "  fairchem-dens evaluate --splits id=data/is2re_val_id --relaxed id=trajectories/val_id"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the checkpoint to score")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["val"],
        metavar="NAME=PATH",
        help="labelled data: a folder of LMDBs, or an LMDB file, under a name; or 'val' or 'test' alone, "
        "which is that split of the checkpoint's own run (default: val)",
    )
    parser.add_argument(
        "--relaxed",
        nargs="+",
        metavar="NAME=RESULTS",
        help="for each split, what `fairchem --mode run-relaxations` left: the folder of trajectories, or an "
        "npz with 'ids' and 'energy', or relaxed_positions.npz, whose energies --checkpoint predicts",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"write {_SCORECARD}.txt, {_SCORECARD}.json and {_PLOT} there (default: only print the table)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--paper",
        nargs="+",
        metavar="NAME",
        help="rows of the paper to compare with, such as oc20-2M-12ep or md17-aspirin, or 'none' (default: "
        "those for splits named as in OC20 or OC22, or made by `data md17`)",
    )
    parser.add_argument(
        "--unit",
        metavar="UNIT",
        help="energy unit of the labels, eV or kcal/mol (default: that in summary.json beside the data, "
        "else eV)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="structures in a batch (default: as in the run)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read (default: 0, which is this one)",
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    parser.add_argument("--amp", action="store_true", help="use mixed precision on a GPU")


def run(args: argparse.Namespace) -> int:
    """Score, print the table and, if asked, write it."""
    from fairchem_dens.data.folder import refuse_existing, write_text, written_aside
    from fairchem_dens.evaluation import parity_plot, report

    if args.out is not None and not args.overwrite:
        refuse_existing(args.out)
    with _quiet():
        card = _scored(args)
    text = report.table(card)
    print(text)
    if args.out is not None:
        with written_aside(args.out, overwrite=args.overwrite) as folder:
            write_text(folder / f"{_SCORECARD}.txt", text + "\n")
            content = json.dumps(report.as_data(card), indent=2, ensure_ascii=False, allow_nan=False)
            write_text(folder / f"{_SCORECARD}.json", content + "\n")
            parity_plot.draw(folder / _PLOT, card)
        print(f"\nwrote {args.out}: {_SCORECARD}.txt, {_SCORECARD}.json, {_PLOT}")
    return 0


def _scored(args: argparse.Namespace) -> Scorecard:
    from fairchem_dens.data.labels import UNITS
    from fairchem_dens.evaluation import is2re, metrics, paper, s2ef
    from fairchem_dens.evaluation.scorecard import Scorecard
    from fairchem_dens.evaluation.splits import find_splits
    from fairchem_dens.inference import trainer_of

    if args.unit is not None and args.unit not in UNITS:
        raise ValueError(f"'--unit' must be one of {', '.join(UNITS)}, found {args.unit!r}.")
    if args.checkpoint is None and args.relaxed is None:
        raise ValueError("Give '--checkpoint' to score predictions, or '--relaxed' to score relaxations.")
    rows = paper.rows_of([] if args.paper in (None, ["none"]) else args.paper)
    trainer = None
    splits = find_splits(args.splits, checkpoint=args.checkpoint, unit=args.unit)
    results = _relaxed([split.name for split in splits], args.relaxed)
    if args.checkpoint is not None:
        trainer = trainer_of(
            args.checkpoint,
            batch_size=args.batch_size,
            num_workers=args.workers,
            cpu=True if args.cpu else None,
            amp=args.amp,
        )
    if args.paper is None:
        molecules = [split.molecule for split in splits]
        rows = paper.comparable([split.name for split in splits], molecules, relaxed=args.relaxed is not None)
    width = max(len(split.name) for split in splits)
    scores = []
    for split in splits:
        progress = f"  {split.name:{width}}"
        if args.relaxed is None:
            assert trainer is not None
            scores.append(s2ef.score(trainer, split, progress=progress))
        else:
            energies = is2re.relaxed_energies(results[split.name], split, trainer, progress=progress)
            scores.append(is2re.score(split, energies, where=results[split.name]))
    return Scorecard(
        scored=results or {split.name: str(args.checkpoint) for split in splits},
        metrics=metrics.S2EF if args.relaxed is None else metrics.IS2RE,
        scores=scores,
        paper=rows,
    )


def _relaxed(names: list[str], given: list[str] | None) -> dict[str, str]:
    """Return the results of relaxations by split."""
    results: dict[str, str] = {}
    for text in given or []:
        name, _, path = text.partition("=")
        if not name or not path or name in results:
            raise ValueError(f"'--relaxed {text}' must be NAME=RESULTS, with each NAME once.")
        results[name] = path
    if given is not None and set(results) != set(names):
        raise ValueError(
            f"'--splits' names {', '.join(names)} and '--relaxed' {', '.join(results)}: both must name the "
            "same."
        )
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep fairchem's remarks on how it trains, and torch's on a missing GPU, out of a scorecard."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairchem\.core")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        logging.getLogger().setLevel(level)
