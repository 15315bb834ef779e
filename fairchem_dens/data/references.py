"""Per-element linear references: reading them, and refusing elements that they say nothing about.

A reference file holds one energy for each atomic number; fairchem's ``element_references`` subtracts their
sum over the atoms from the label and adds it to the prediction. A fit determines only the elements it saw.
What stands in a file for the others is 0, or whatever an ill-posed fit left there, up to 1e12 eV in files
that are in use: added to a prediction, both are wrong without a word. Here both count as no reference.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from fairchem_dens import keys
from fairchem_dens.data.folder import refuse_existing
from fairchem_dens.data.npz import write_npz

NUM_COEFFICIENTS = 119
"""Atomic numbers from 0, which is no element, to 118."""
_FILE_KEYS = ("coeff", "element_references")
"""What fairchem reads from an ``.npz``, in this order."""
_ALL_ELECTRONS = 7 / 3
"""The energy of a free atom with all its electrons grows with this power of Z, by up to 21 eV."""
_PER_ATOM_LIMIT = 1000.0
"""eV; 21 in kcal/mol is 480."""
_FAR = 100.0
_NEVER_ABSURD = 1000.0
"""eV."""


def usable(coefficients: np.ndarray) -> np.ndarray:
    """Tell which coefficients are references.

    Not one is a coefficient that is not finite, is exactly 0 (no fit gives that to an element it saw), or is
    absurdly large, as a fit leaves it that has too little data for the element. Absurd is what no atom has
    even with all its electrons, 1000 eV · Z^(7/3), and what is above 1000 eV and more than 100 times the
    lower quartile of the others both as it is and divided by Z^(7/3). Energies without core electrons hardly
    grow with Z, those of all electrons as that power; each of the two is left alone.

    Args:
        coefficients: (Z,), by atomic number.

    Returns:
        (Z,) bool.
    """
    sizes = np.abs(np.asarray(coefficients, dtype=np.float64))
    atom = np.arange(len(sizes)) ** _ALL_ELECTRONS
    known = np.isfinite(sizes) & (sizes > 0)
    known[known] = sizes[known] <= _PER_ATOM_LIMIT * atom[known]
    if not known.any():
        return known
    sizes, relative = sizes[known], sizes[known] / atom[known]
    known[known] = (sizes <= max(_NEVER_ABSURD, _FAR * np.quantile(sizes, 0.25))) | (
        relative <= _FAR * np.quantile(relative, 0.25)
    )
    return known


def padded(coefficients: np.ndarray) -> np.ndarray:
    """Return (119,) float64 coefficients with NaN for what is no reference.

    A NaN makes a run on such an element fail, where fairchem would add 0 or 1e12 eV to its predictions.
    """
    complete = np.full(NUM_COEFFICIENTS, np.nan)
    complete[: len(coefficients)] = np.where(usable(coefficients), coefficients, np.nan)
    return complete


def read_references(file: str | Path, where: str = "element references") -> np.ndarray:
    """Read the coefficients of an ``.npz`` file as they are.

    Args:
        file: holds ``coeff`` or, as fairchem writes it, ``element_references``.
        where: what names the file, for messages.

    Returns:
        (Z,) float64, eV, by atomic number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ``.npz``, has neither key, or holds something other than up to 119 numbers.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file '{file}' (looked in {Path.cwd()}).")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        with loaded as arrays:
            name = next((name for name in _FILE_KEYS if name in arrays), None)
            if name is None:
                raise ValueError(f"it holds {', '.join(arrays) or 'nothing'} and not 'coeff'")
            coefficients = arrays[name].astype(np.float64)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{where}: '{file}' is not a file of element references: {error}. It must be an .npz with "
            "'coeff', one energy in eV for each atomic number from 0."
        ) from error
    if coefficients.ndim != 1 or not 2 <= len(coefficients) <= NUM_COEFFICIENTS:
        raise ValueError(
            f"{where}: '{name}' of '{file}' has the shape {coefficients.shape}; it must be (Z,) with one "
            f"energy in eV for each atomic number from 0, at most {NUM_COEFFICIENTS}."
        )
    return coefficients


def write_references(file: str | Path, coefficients: np.ndarray) -> None:
    """Write coefficients as fairchem's ``element_references`` reads them; see `padded`."""
    write_npz(file, coeff=padded(coefficients))


def describe_elements(numbers: Iterable[int], coefficients: np.ndarray) -> str:
    """Name elements with what stands for them, such as ``P (3.137e+07 eV), La (0 eV), U (none)``."""
    return ", ".join(
        f"{symbol(number)} "
        f"({f'{coefficients[number]:.4g} eV' if 0 <= number < len(coefficients) else 'none'})"
        for number in numbers
    )


def symbol(number: int) -> str:
    """Return the symbol of an element, or its number where there is none."""
    return chemical_symbols[number] if 0 < number < len(chemical_symbols) else f"number {number}"


def without_reference(numbers: Iterable[int], coefficients: np.ndarray) -> list[int]:
    """Return those of the given atomic numbers, sorted and each once, that have no usable coefficient."""
    known = np.isfinite(padded(coefficients))
    return [n for n in sorted({int(n) for n in numbers}) if not 0 < n < len(known) or not known[n]]


def convert(file: str | Path, out: str | Path, elements: Iterable[int] | None = None) -> np.ndarray:
    """Write the references of a file such that elements without one fail instead of giving nonsense.

    Args:
        file: see `read_references`.
        out: the ``.npz`` to write, a new file.
        elements: atomic numbers in the data that the references are for, if it is known.

    Returns:
        The coefficients that were read, (Z,).

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: ``out`` exists.
        ValueError: the file is none of references, ``out`` does not end in ``.npz``, or one of the elements
            has no usable coefficient; names them all.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"'--out {out}' must end in .npz: fairchem tells the format by it.")
    refuse_existing(out)
    coefficients = read_references(file)
    missing = without_reference(elements or (), coefficients)
    if missing:
        raise ValueError(
            f"The data contain elements for which '{file}' has no usable reference: "
            f"{describe_elements(missing, coefficients)}. Fit references to the data (fairchem-dens data "
            "fit-stats SRC --references fit --out FOLDER), or leave these structures out."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_references(out, coefficients)
    return coefficients


# ------------------------------------------------------------------ in a run


def check_settings(settings: Any, where: str) -> None:
    """Refuse reference files that fairchem would stumble over.

    Args:
        settings: what stands under ``transforms.element_references``.
        where: its YAML path.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the settings or an ``.npz`` are not as fairchem reads them.
    """
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"'{where}' must be a mapping, such as energy: {{file: FILE.npz}}, found {settings!r}."
        )
    if "file" in settings and not Path(str(settings["file"])).is_file():
        raise FileNotFoundError(f"'{where}.file' names '{settings['file']}', which does not exist.")
    for target, source in settings.items():
        if target in ("fit", "file"):
            continue
        place = f"{where}.{target}"
        if not isinstance(source, Mapping) or "file" not in source:
            raise ValueError(f"'{place}' must be {{file: FILE.npz}}, found {source!r}.")
        suffix = Path(str(source["file"])).suffix
        if suffix == ".npz":
            read_references(source["file"], where=f"'{place}.file'")
        elif suffix != ".pt":
            raise ValueError(f"'{place}.file' must end in .npz or .pt, found '{source['file']}'.")


def origins(settings: Mapping[str, Any] | None, where: str) -> dict[str, str]:
    """Say for each target where its references come from: the YAML key and what it holds."""
    said = {}
    for target, source in (settings or {}).items():
        if target == "fit":
            said.update(dict.fromkeys(source.get("targets", ()), f"the fit that '{where}.fit' asks for"))
        elif target != "file":
            said[target] = f"'{where}.{target}.file' ('{source['file']}')"
    return said


@dataclass(frozen=True)
class ReferenceGuard:
    """Refuses structures with an element that the references of a run say nothing about.

    Attributes:
        origin: where the references come from, for messages.
        coefficients: (Z,), by atomic number, as they came.
        known: (119,) bool on the host.
    """

    origin: str
    coefficients: np.ndarray
    known: Tensor

    @classmethod
    def of(cls, element_references: Tensor, origin: str) -> ReferenceGuard:
        """Guard a module's coefficients, and make those that are no references NaN in place.

        Args:
            element_references: (Z,), the buffer of fairchem's ``LinearReferences``.
            origin: where they come from.
        """
        coefficients = element_references.detach().cpu().double().numpy().copy()
        known = torch.from_numpy(usable(coefficients))
        element_references[~known.to(element_references.device)] = torch.nan
        complete = torch.zeros(NUM_COEFFICIENTS, dtype=torch.bool)
        complete[: len(known)] = known
        complete[0] = False
        return cls(origin, coefficients, complete)

    def check(self, data: Any, source: str = "") -> None:
        """Raise if a structure has an element without a reference.

        Batches come from the loader and are still on the host here, so that this waits for no device.

        Args:
            data: structure or batch.
            source: where it comes from, for the message.

        Raises:
            ValueError: names element, structure and YAML key.
        """
        numbers = data[keys.ATOMIC_NUMBERS].cpu().long()
        last = len(self.known) - 1
        refused = ~self.known[numbers.clamp(0, last)] | (numbers < 0) | (numbers > last)
        if not bool(refused.any()):
            return
        atom = int(refused.long().argmax())
        structure = int(data[keys.BATCH][atom]) if keys.BATCH in data else None
        sid = data[keys.SID] if keys.SID in data else "unknown"  # noqa: SIM401  # Data.get is new
        if structure is not None and keys.SID in data:
            sid = sid[structure]
        sid = sid.item() if isinstance(sid, Tensor) and sid.numel() == 1 else sid
        elements = sorted(set(numbers[refused].tolist()))
        raise ValueError(
            f"A structure{source and f' of {source}'} (sid {sid}) contains {symbol(int(numbers[atom]))}, and "
            f"{self.origin} has no usable coefficient for: {describe_elements(elements, self.coefficients)}. "
            "Predicted energies would be wrong by any amount. Fit references to your data (fairchem-dens "
            "data fit-stats SRC --references fit --out FOLDER), or leave such structures out. An element "
            "whose reference is meant to be 0 needs 1e-9 in its place."
        )
