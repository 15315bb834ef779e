"""The published files of MD17 and of revised MD17: fetched, read, and made sure of.

There are two sets of labels for the same structures. The original ones (Chmiela et al. 2017), which the paper
uses, come in files with the keys E, F, R and z. The revised ones (Christensen and von Lilienfeld 2020) come
in files that hold the original labels of their frames as well. The sets differ by hundreds of kcal/mol and
must never be mixed.
"""

from __future__ import annotations

import contextlib
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from ase import Atoms

from fairchem_dens.data.folder import written_aside

Labels = Literal["original", "revised"]

MOLECULES: Final[Mapping[str, str]] = {
    "aspirin": "C9H8O4",
    "benzene": "C6H6",
    "ethanol": "C2H6O",
    "malonaldehyde": "C3H4O2",
    "naphthalene": "C10H8",
    "salicylic": "C7H6O3",
    "toluene": "C7H8",
    "uracil": "C4H4N2O2",
    "azobenzene": "C12H10N2",
    "paracetamol": "C8H9NO2",
}
"""Formula of each molecule, in Hill's order. The paper trains on the first eight."""

_KEYS: Final[Mapping[Labels, Mapping[str, str]]] = {
    "original": {"numbers": "z", "positions": "R", "energies": "E", "forces": "F"},
    "revised": {
        "numbers": "nuclear_charges",
        "positions": "coords",
        "energies": "energies",
        "forces": "forces",
    },
}
"""By the set that a file belongs to: the key of each array."""
_ORIGINAL_LABELS_IN_REVISED: Final = {"energies": "old_energies", "forces": "old_forces"}

_WIDEST_GAP = 50.0
"""kcal/mol. Sorted energies of a trajectory lie close; label sets are farther apart than this."""


@dataclass(frozen=True)
class Trajectory:
    """The frames of a file with one set of labels, in the order of the file.

    Attributes:
        numbers: (N,) atomic numbers.
        positions: (F, N, 3), Å.
        energies: (F,) float64, kcal/mol, total energies.
        forces: (F, N, 3), kcal/mol/Å.
        published_as: the set that the file belongs to, whichever labels were taken from it.
    """

    numbers: np.ndarray
    positions: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    published_as: Labels

    def __len__(self) -> int:
        return len(self.energies)


def download(molecule: str, labels: Labels, folder: str | Path) -> Path:
    """Fetch the file of a molecule with torch_geometric's ``MD17``; one that is there is taken as it is.

    Args:
        molecule: a name of `MOLECULES`.
        labels: whether the original or the revised file; the revised ones come all in one archive.
        folder: gets a folder with the file, which is there whole or not at all.

    Raises:
        FileNotFoundError: it cannot be fetched; names the file to give instead.
    """
    from torch_geometric.datasets import MD17

    class Download(MD17):  # type: ignore[misc]  # torch_geometric is not typed
        """The download alone: converting a million frames to tensors would take minutes and lose digits."""

        has_process = False

        def load(self, path: str, *_: Any, **__: Any) -> None:
            """There is nothing to load."""

    name = "salicylic acid" if molecule == "salicylic" else molecule
    if labels == "revised":
        name = f"revised {name}"
    target = Path(folder) / (molecule if labels == "original" else "revised")
    if not target.exists():
        try:
            with written_aside(target) as aside:
                Download(str(aside), name)
        except (OSError, HTTPException, tarfile.TarError) as error:
            with contextlib.suppress(OSError):  # it holds other downloads
                target.parent.rmdir()
            raise FileNotFoundError(
                f"'{Path(MD17.file_names[name]).name}' ({labels} MD17) cannot be downloaded "
                f"({type(error).__name__}): fetch it where there is a connection, and give it with "
                "'--npz FILE'."
            ) from error
    return Path(Download(str(target), name).raw_paths[0])


def read_npz(file: str | Path, molecule: str, labels: Labels) -> Trajectory:
    """Read a file of MD17 or of revised MD17, and make sure that it is what it should be.

    Args:
        file: the published ``.npz``.
        molecule: the molecule that it must be of.
        labels: which labels to take. A file of revised MD17 has both.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ``.npz``, lacks keys or the labels, holds another molecule, arrays that do not
            fit together or are not finite, or energies of two label sets. Frames are counted from 0.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}': give the .npz of MD17 or of revised MD17.")
    arrays, names, published_as = _read_arrays(file, labels)
    positions = arrays["positions"]
    if positions.ndim != 3 or positions.shape[2] != 3 or 0 in positions.shape:
        raise ValueError(
            f"'{file}': '{names['positions']}' must be of shape (frames, atoms, 3), found {positions.shape}."
        )
    frames, natoms, _ = positions.shape
    numbers = _constant_numbers(arrays["numbers"], frames, natoms, names["numbers"], file)
    _check_formula(numbers, molecule, file)
    energies = _energies(arrays["energies"], frames, names["energies"], file)
    if arrays["forces"].shape != positions.shape:
        raise ValueError(
            f"'{file}': '{names['forces']}' must be of the shape of '{names['positions']}', "
            f"{positions.shape}, found {arrays['forces'].shape}."
        )
    for field in ("positions", "energies", "forces"):
        bad = ~np.isfinite(arrays[field].reshape(frames, -1)).all(axis=1)
        if bad.any():
            raise ValueError(
                f"'{file}': '{names[field]}' is not finite in {bad.sum()} frames, the first of them is "
                f"{bad.argmax()}."
            )
    _refuse_two_groups(energies, f"'{names['energies']}'", file)
    if "other_energies" in arrays:
        others = _energies(arrays["other_energies"], frames, names["other_energies"], file)
        what = f"the differences between '{names['energies']}' and '{names['other_energies']}'"
        _refuse_two_groups(energies - others, what, file)
    return Trajectory(numbers, positions, energies, arrays["forces"], published_as)


def _read_arrays(file: Path, labels: Labels) -> tuple[dict[str, np.ndarray], dict[str, str], Labels]:
    """Return arrays and their keys by field, and the set that the file belongs to.

    ``other_energies`` are those of the labels that were not asked for, where the file has them.
    """
    unreadable = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
    try:
        archive = np.load(file, allow_pickle=False)
    except unreadable as error:
        raise ValueError(
            f"'{file}' cannot be read as an .npz ({error}): remove it and fetch it again."
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"'{file}' is a single array, not an .npz.")
    with archive:
        names, published_as = _choose_keys(file, archive.files, labels)
        arrays = {}
        for field, name in names.items():
            try:
                arrays[field] = archive[name]
            except unreadable as error:
                raise ValueError(
                    f"'{file}': '{name}' cannot be read ({error}): remove it and fetch it again."
                ) from error
            if arrays[field].dtype.kind not in "fiu":
                raise ValueError(f"'{file}': '{name}' must be numbers, found {arrays[field].dtype}.")
    return arrays, names, published_as


def _choose_keys(file: Path, found: list[str], labels: Labels) -> tuple[dict[str, str], Labels]:
    """Return the key of each array, and the set that the file belongs to."""
    known = {published_as: set(names.values()) for published_as, names in _KEYS.items()}
    known["revised"] |= set(_ORIGINAL_LABELS_IN_REVISED.values())
    published_as: Labels = max(known, key=lambda name: len(known[name] & set(found)))
    if not known[published_as] & set(found):
        raise ValueError(
            f"'{file}' is neither of MD17 (keys {', '.join(sorted(known['original']))}) nor of revised MD17 "
            f"(keys {', '.join(sorted(known['revised']))}): its keys are {', '.join(found) or 'none'}."
        )
    if (published_as, labels) == ("original", "revised"):
        raise ValueError(
            f"'{file}' holds the original labels only (keys {', '.join(found)}): give the file of revised "
            "MD17, or take '--labels original'."
        )
    names = dict(_KEYS[published_as])
    others = _ORIGINAL_LABELS_IN_REVISED["energies"] if published_as == "revised" else None
    if published_as != labels:
        others = names["energies"]
        names |= _ORIGINAL_LABELS_IN_REVISED
    missing = sorted(set(names.values()) - set(found))
    if missing:
        raise ValueError(
            f"'{file}' lacks {', '.join(repr(name) for name in missing)} for the {labels} labels. Its keys "
            f"are {', '.join(found)}."
        )
    if others in found:
        names["other_energies"] = others
    return names, published_as


def _constant_numbers(numbers: np.ndarray, frames: int, natoms: int, name: str, file: Path) -> np.ndarray:
    """Return (N,) atomic numbers, from one row or from equal rows for all frames."""
    if numbers.shape not in ((natoms,), (frames, natoms)):
        raise ValueError(f"'{file}': '{name}' must be of shape ({natoms},), found {numbers.shape}.")
    rows = numbers.reshape(-1, natoms)
    differs = (rows != rows[0]).any(axis=1)
    if differs.any():
        raise ValueError(
            f"'{file}': '{name}' must be the same in all frames, but frame {differs.argmax()} differs from "
            "frame 0: a file must hold one molecule."
        )
    return rows[0].astype(np.int64)


def _check_formula(numbers: np.ndarray, molecule: str, file: Path) -> None:
    if numbers.min() < 1 or numbers.max() > 118:
        raise ValueError(f"'{file}' holds atomic numbers from {numbers.min()} to {numbers.max()}.")
    formula = Atoms(numbers=numbers).get_chemical_formula()
    if formula != MOLECULES[molecule]:
        name = next((name for name, known in MOLECULES.items() if known == formula), None)
        hint = f": it is the file of {name}" if name else ""
        raise ValueError(f"'{file}' holds {formula}, but {molecule} is {MOLECULES[molecule]}{hint}.")


def _energies(energies: np.ndarray, frames: int, name: str, file: Path) -> np.ndarray:
    if energies.shape not in ((frames,), (frames, 1)):
        raise ValueError(
            f"'{file}': '{name}' must be of shape ({frames},) or ({frames}, 1), found {energies.shape}."
        )
    return energies.reshape(frames).astype(np.float64)


def _refuse_two_groups(values: np.ndarray, what: str, file: Path) -> None:
    """Refuse energies with a gap among them that no motion of a molecule leaves."""
    if len(values) < 2:
        return
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order])
    last = int(gaps.argmax())
    if gaps[last] > _WIDEST_GAP:
        low, high = values[order[: last + 1]], values[order[last + 1 :]]
        odd = order[: last + 1] if len(low) < len(high) else order[last + 1 :]
        raise ValueError(
            f"'{file}': {what} fall into two groups, {len(low)} frames around {low.mean():.1f} and "
            f"{len(high)} around {high.mean():.1f} kcal/mol (the smaller group begins with frame "
            f"{odd.min()}): original and revised labels must not be mixed."
        )
