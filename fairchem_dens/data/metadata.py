"""``metadata.npz``, which tells fairchem the number of atoms of each structure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fairchem_dens.data.inspection import Finding, Inspection
from fairchem_dens.data.npz import write_npz


def metadata_findings(inspection: Inspection) -> Iterator[Finding]:
    """Say whether the file is missing, or does not fit the structures that were read."""
    file = inspection.source.metadata_file
    if file is None:
        return
    if not file.is_file():
        yield Finding(
            False,
            f"'{file}' is missing: load balancing and max_atoms need it (--write-metadata makes it)",
        )
        return
    wrong = _fault(file, inspection)
    if wrong is not None:
        yield Finding(True, f"'{file}' {wrong} (--write-metadata replaces it)")


def _fault(file: Path, inspection: Inspection) -> str | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            natoms = arrays["natoms"]
    except Exception as error:
        return f"cannot be read: {error}"
    if any(record.index is None for record in inspection.records):
        return None  # of how many structures it should tell is not known
    if natoms.ndim != 1 or not np.issubdtype(natoms.dtype, np.integer):
        return f"has 'natoms' of type {natoms.dtype} and shape {natoms.shape}, not whole numbers"
    if len(natoms) != inspection.total:
        return f"tells the sizes of {len(natoms)} structures, there are {inspection.total}"
    places = np.array(inspection.statistics.places, dtype=np.int64)
    wrong = np.flatnonzero(natoms[places] != np.array(inspection.statistics.natoms))
    if len(wrong):
        first = int(places[wrong[0]])
        return (
            f"is wrong for {len(wrong)} structures, first for {first}: {natoms[first]} instead of "
            f"{inspection.statistics.natoms[int(wrong[0])]} atoms"
        )
    return None


def write_metadata(inspection: Inspection) -> Path | None:
    """Write ``metadata.npz`` where it is missing or wrong, and forget the finding on it.

    Args:
        inspection: of a whole set.

    Returns:
        The file; None if what was there is right.

    Raises:
        ValueError: not all structures were read, the data are of another format, or one file of a folder
            was named.
    """
    source, file = inspection.source, inspection.source.metadata_file
    if file is None:
        raise ValueError(f"'{source.name}' is of the format '{source.format}', which has no metadata.npz.")
    if file.is_file() and _fault(file, inspection) is None:
        return None
    natoms = np.array(inspection.statistics.natoms, dtype=np.int64)
    if len(natoms) != inspection.total or any(record.index is None for record in inspection.records):
        raise ValueError(
            f"'{file}' was not written: its entries belong to the structures by their order, and "
            f"{inspection.total - len(natoms)} of {inspection.total} structures or a whole file could not be "
            "read. Remove or repair them first."
        )
    others = set(file.parent.glob("*.lmdb")) - set(source.files)
    if others:
        raise ValueError(
            f"'{file}' was not written: it stands for all LMDB files of its folder. Give the folder itself."
        )
    write_npz(file, natoms=natoms[np.argsort(inspection.statistics.places)])
    inspection.findings = [f for f in inspection.findings if not f.text.startswith(f"'{file}'")]
    return file
