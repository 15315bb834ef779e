"""What is on record about the labels of a data set: their unit, and which of several sets of labels they are.

The commands that make data sets write it into ``summary.json``, beside the folders of the splits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import units

SUMMARY_FILE = "summary.json"
UNITS: Mapping[str, float] = {"eV": 1.0, "kcal/mol": units.kcal / units.mol}
"""Units of energy, in eV. Forces are in the same per Å."""


@dataclass(frozen=True)
class Labelling:
    """What is on record.

    Attributes:
        unit: of energies; that of forces is this one per Å.
        kind: such as ``original`` or ``revised``; None where there is one set only, or nothing on record.
        molecule: of MD17; else None.
    """

    unit: str = "eV"
    kind: str | None = None
    molecule: str | None = None

    @property
    def ev(self) -> float:
        """The unit in eV."""
        return UNITS.get(self.unit, 1.0)


def labels_of(src: str | Path) -> Labelling:
    """Return what is on record about the labels of a split: eV where there is nothing.

    Args:
        src: its folder, or an LMDB in it.
    """
    path = Path(src)
    folder = path.parent if path.is_file() else path
    try:
        summary = json.loads((folder.absolute().parent / SUMMARY_FILE).read_text(encoding="utf-8"))
        unit = summary.get("units", {}).get("energy", Labelling.unit)
        return Labelling(unit, summary.get("labels"), summary.get("molecule"))
    except (OSError, ValueError, AttributeError):
        # None, or a file of somebody else's of that name.
        return Labelling()


def check_labels_agree(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse splits of different sets of labels, such as original and revised MD17.

    Args:
        splits: settings by split; those without a ``src`` of one folder are passed over.

    Raises:
        ValueError: names two splits, their folders and what is on record about them.
    """
    first: tuple[str, str, Labelling] | None = None
    for name, settings in splits.items():
        src = settings.get("src")
        if not isinstance(src, str) or not src:
            continue
        labels = labels_of(src)
        if labels.kind is None:
            continue
        if first is None:
            first = name, src, labels
        elif first[2] != labels:
            raise ValueError(
                f"'dataset.{first[0]}.src' ('{first[1]}') has {_said(first[2])}, 'dataset.{name}.src' "
                f"('{src}') {_said(labels)}: make all splits from one set of labels."
            )


def _said(labels: Labelling) -> str:
    return f"{labels.kind} labels in {labels.unit}"
