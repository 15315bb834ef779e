"""Which data a checkpoint is scored on, and in which unit its labels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairchem_dens import inference
from fairchem_dens.data.labels import SUMMARY_FILE, UNITS, Labelling, labels_of


@dataclass(frozen=True, kw_only=True)
class Split:
    """Labelled data under a name.

    Attributes:
        name: what it is called in the scorecard.
        path: of the data.
        source: what is opened, see `fairchem_dens.inference.Source`.
        unit: of its energies, one of `UNITS`.
        molecule: the molecule where it is MD17 with the labels that the paper uses, else None.
    """

    name: str
    path: Path
    source: inference.Source
    unit: str = Labelling.unit
    molecule: str | None = None

    @property
    def in_ev(self) -> float:
        """One unit of its energies, in eV."""
        return UNITS[self.unit]


def find_splits(
    asked: Sequence[str], *, checkpoint: str | Path | None = None, unit: str | None = None
) -> list[Split]:
    """Find the data that a command line names.

    Args:
        asked: ``NAME=PATH``, or the name of a split that the run of the checkpoint had (``val`` or ``test``).
        checkpoint: the file whose run is meant by such names.
        unit: of all energies; None takes what ``summary.json`` beside the data says, else eV.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a name is given twice, or is not one of the checkpoint's splits; the unit is unknown.
    """
    of_run = None
    splits: dict[str, Split] = {}
    for text in asked:
        name, is_pair, path = text.partition("=")
        source: inference.Source = path
        if not is_pair:
            if of_run is None:
                of_run = inference.splits_of(checkpoint) if checkpoint is not None else {}
            if name not in of_run:
                given = ", ".join(f"'{known}'" for known in of_run) or "no split"
                raise ValueError(
                    f"'--splits {text}': the checkpoint's run had {given} of its own. Name data as "
                    "NAME=PATH, such as '--splits val_id=data/val_id'."
                )
            source = of_run[name]
            path = str(of_run[name]["src"])
        if not name or not path:
            raise ValueError(f"'--splits {text}' must be NAME=PATH, such as 'val_id=data/val_id'.")
        if name in splits:
            raise ValueError(f"'--splits' names '{name}' twice: give each its own name.")
        if not Path(path).exists():
            raise FileNotFoundError(
                f"The split '{name}' is '{path}', which does not exist (looked in {Path.cwd()})."
            )
        splits[name] = _described(name, Path(path), source, unit)
    if not splits:
        raise ValueError("'--splits' names no data.")
    return list(splits.values())


def _described(name: str, path: Path, source: inference.Source, unit: str | None) -> Split:
    labels = labels_of(path)
    if unit is None and labels.unit not in UNITS:
        raise ValueError(
            f"'{SUMMARY_FILE}' beside '{path}' says that energies are in {labels.unit!r}, which is none of "
            f"{', '.join(UNITS)}: give the unit with --unit."
        )
    molecule = labels.molecule if labels.kind == "original" else None
    return Split(name=name, path=path, source=source, unit=unit or labels.unit, molecule=molecule)
