"""From an inspected data set to normalisers and element references on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairchem_dens.data import references as element_references
from fairchem_dens.data.findings import needed_key_mapping
from fairchem_dens.data.folder import refuse_existing, written_aside
from fairchem_dens.data.inspection import Inspection
from fairchem_dens.data.report import scales
from fairchem_dens.data.settings_file import (
    SETTINGS_FILE,
    dataset_settings,
    write_normalizers,
    write_settings,
)
from fairchem_dens.data.statistics import Statistics

REFERENCES_FILE = "energy_references.npz"


def fit_and_write(inspection: Inspection, out: str | Path, *, references: str = "none") -> list[str]:
    """Write the normalisers of a data set, and the references that its energies are measured from.

    Args:
        inspection: of the train split.
        out: a new folder, or a new ``.yml``.
        references: ``none``, ``fit``, or an ``.npz`` file.

    Returns:
        Lines on what was found and written.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: the file of references does not exist.
        ValueError: a record is wrong, labels are missing or do not vary, or an element has no reference.
    """
    out = Path(out)
    single = out.suffix in (".yml", ".yaml")
    new_references = out.with_name(f"{out.stem}_references.npz") if single else out / REFERENCES_FILE
    refuse_existing(out)
    if single and references == "fit":
        refuse_existing(new_references)
    if inspection.records:
        first = inspection.records[0]
        raise ValueError(
            f"{len(inspection.records)} records of '{inspection.source.name}' are wrong, first "
            f"{first.index if first.index is not None else 'all'} of '{first.file}': {first.text}. "
            "Statistics of the others would hide that: remove or repair them (fairchem-dens data check lists "
            "all)."
        )
    statistics = inspection.statistics
    coefficients = _coefficients(statistics, references)
    energy, forces = scales(statistics, coefficients)
    file = None if references == "none" else new_references if references == "fit" else Path(references)
    source = inspection.source
    settings = dataset_settings(energy=energy, forces=forces, element_references=file)
    if not source.from_yaml:
        settings["dataset"]["train"] |= {"format": source.format, "src": str(Path(source.name).absolute())}
        mapping = needed_key_mapping(statistics)
        settings["dataset"]["train"] |= {"key_mapping": mapping} if mapping else {}
    unit = source.labels.unit
    header = (
        f"Normalisers of {source.name}, {statistics.read} of {inspection.total} structures "
        f"({unit}, {unit}/Å).\n"
        f"Energies less {_REFERENCES.get(references, f'the references of {references}')}: mean and root mean "
        "square deviation.\nForces: root mean square of the components on free atoms; OC20's own convention "
        f"divides them by the spread of energies, {energy.rmsd}."
    )
    if single:
        out.parent.mkdir(parents=True, exist_ok=True)
        if references == "fit" and coefficients is not None:
            element_references.write_references(new_references, coefficients)
        write_settings(out, settings, header)
    else:
        with written_aside(out) as folder_aside:
            write_normalizers(folder_aside, energy=energy, forces=forces)
            if references == "fit" and coefficients is not None:
                element_references.write_references(folder_aside / REFERENCES_FILE, coefficients)
            write_settings(folder_aside / SETTINGS_FILE, settings, header)
    return _said(statistics, references, coefficients, energy.rmsd, out if single else out / SETTINGS_FILE)


_REFERENCES = {"none": "nothing", "fit": "references fitted to them"}


def _coefficients(statistics: Statistics, references: str) -> np.ndarray | None:
    if references == "none":
        return None
    if references == "fit":
        if not statistics.fit.count:
            raise ValueError("There are no energies to fit references to.")
        return statistics.fit.solve()
    given = element_references.read_references(references, "'--references'")
    missing = element_references.without_reference(statistics.elements, given)
    if missing:
        raise ValueError(
            f"'--references {references}' has no usable reference for elements in the data: "
            f"{element_references.describe_elements(missing, given)}. Use '--references fit', or leave these "
            "structures out."
        )
    return element_references.padded(given)


def _said(
    statistics: Statistics, references: str, coefficients: np.ndarray | None, rmsd: float, file: Path
) -> list[str]:
    lines = []
    if references == "fit" and coefficients is not None:
        elements = len(statistics.elements)
        lines.append(
            f"{elements} references fitted to {statistics.fit.count} energies: they spread by "
            f"{np.std(statistics.energies):.6g} before and {rmsd:.6g} after (in units of the energies)."
        )
        if statistics.fit.rank < elements:
            lines.append(
                f"The compositions determine {statistics.fit.rank} of them, and how these are shared out "
                "among the elements is arbitrary: right for compositions like these, not for others."
            )
    return [*lines, f"wrote {file}", f"Include it in a YAML:\n  includes:\n    - {file.absolute()}"]
