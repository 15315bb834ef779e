"""What a data set adds to a YAML: a small file to include, and normalisers as files that fairchem reads.

A run uses one of the two. Included, `data.yml` brings paths and numbers:

    includes:
      - YOUR/FOLDER/data.yml

A YAML that names its paths itself points at the files instead:
``transforms: {normalizer: {energy: {file: YOUR/FOLDER/energy_normalizer.npz}}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fairchem_dens import keys
from fairchem_dens.data.folder import write_text

SETTINGS_FILE = "data.yml"


@dataclass(frozen=True)
class Scale:
    """What a normaliser subtracts and divides by, in the units of the data.

    Attributes:
        mean: subtracted; 0 for forces, which have a direction.
        rmsd: root mean square deviation from it.
    """

    mean: float
    rmsd: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean) and np.isfinite(self.rmsd) and self.rmsd > 0):
            raise ValueError(
                f"A normaliser needs a finite mean and an rmsd above 0, found mean {self.mean} and rmsd "
                f"{self.rmsd}: are all targets equal, or some not finite?"
            )


def dataset_settings(
    *,
    energy: Scale,
    forces: Scale,
    sources: Mapping[str, Path] | None = None,
    element_references: Path | None = None,
) -> dict[str, Any]:
    """Return the ``dataset`` part of a YAML.

    Args:
        energy: normaliser of the energies, less the references if there are any.
        forces: normaliser of the forces.
        sources: LMDB folder of each split; none leaves ``src`` and ``format`` to the YAML that includes this.
        element_references: file of per-element references, ``.npz`` with ``coeff`` or ``.pt``.
    """
    transforms: dict[str, Any] = {"normalizer": {keys.ENERGY: asdict(energy), keys.FORCES: asdict(forces)}}
    if element_references is not None:
        transforms["element_references"] = {keys.ENERGY: {"file": str(element_references.absolute())}}
    train: dict[str, Any] = {"transforms": transforms}
    splits: dict[str, Any] = {"train": train}
    for split, folder in (sources or {}).items():
        splits.setdefault(split, {})["src"] = str(folder.absolute())
    if sources:
        train["format"] = "lmdb"
    return {"dataset": splits}


def write_settings(file: str | Path, settings: Mapping[str, Any], header: str) -> None:
    """Write settings as a YAML that opens with ``header`` as a comment."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    write_text(file, comment + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def write_normalizers(folder: str | Path, *, energy: Scale, forces: Scale) -> None:
    """Write ``energy_normalizer.npz`` and ``forces_normalizer.npz``, which fairchem's ``file`` reads."""
    for name, scale in ((keys.ENERGY, energy), (keys.FORCES, forces)):
        np.savez(Path(folder) / f"{name}_normalizer.npz", mean=scale.mean, rmsd=scale.rmsd)
