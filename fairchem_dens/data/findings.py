"""What is to be said about a data set as a whole, once it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import numpy as np

from fairchem_dens import keys, summary
from fairchem_dens.data import references
from fairchem_dens.data.inspection import Finding, Inspection
from fairchem_dens.data.metadata import metadata_findings
from fairchem_dens.data.source import Source, open_part
from fairchem_dens.data.statistics import LARGE_FORCE, Statistics

_DEFAULT_MAX_NUM_ELEMENTS = 90
_MANY = 0.3

Locate = Callable[[int], tuple[str, int]]
"""From the index of a structure in a set to its file and the record in it."""


def findings(inspection: Inspection, place_of: Locate) -> list[Finding]:
    """Judge what was read.

    Args:
        inspection: of a source, without findings.
        place_of: tells where a structure is.
    """
    statistics = inspection.statistics
    groups: list[Iterable[Finding]] = [
        _reading(inspection),
        metadata_findings(inspection),
        _fields(statistics),
        _labels(statistics),
        _atoms(statistics),
        _duplicates(inspection, place_of),
        _molecular_dynamics(inspection.source),
        _settings(inspection),
        _largest_forces(inspection, place_of),
    ]
    return [finding for group in groups for finding in group]


def _reading(inspection: Inspection) -> Iterator[Finding]:
    source = inspection.source
    if source.reduced:
        yield Finding(
            False, f"training uses a part only ({', '.join(source.reduced)}); this report is on all of it"
        )
    if inspection.total == 0:
        yield Finding(True, "there is not one structure in it")


def _fields(statistics: Statistics) -> Iterator[Finding]:
    """Fields must agree between structures, or no batch can be made of them."""
    for name, forms in sorted(statistics.forms.items()):
        count = sum(form.count for form in forms.values())
        if count < statistics.opened:
            with_it = f"'{name}' is in {count} of {statistics.opened} structures"
            yield Finding(True, f"{with_it}: a batch of both cannot be made")
        if len(forms) > 1:
            kinds = ", ".join(
                f"{kind}{'' if rank is None else f' of {rank} dimensions'} ({form.count})"
                for (kind, rank), form in sorted(forms.items(), key=lambda item: -item[1].count)
            )
            yield Finding(True, f"'{name}' differs in type: {kinds}; a batch of both cannot be made")


def needed_key_mapping(statistics: Statistics) -> dict[str, str]:
    """Return the ``key_mapping`` for labels that have their old names, by old name."""
    found = {name for names in statistics.label_names for name in names}
    aliases = keys.ENERGY_ALIASES, keys.FORCES_ALIASES
    return {old: new for new, old in aliases if old in found}


def _labels(statistics: Statistics) -> Iterator[Finding]:
    energies = [name for name, _ in statistics.label_names if name is not None]
    forces = [name for _, name in statistics.label_names if name is not None]
    for what, names in (("energies", energies), ("forces", forces)):
        if not names and statistics.read:
            yield Finding(False, f"there are no {what}: such a set can be predicted on, not trained on")
    mapping = needed_key_mapping(statistics)
    if mapping:
        said = ", ".join(f"{old}: {new}" for old, new in mapping.items())
        yield Finding(False, f"labels have their old names: a YAML needs key_mapping: {{{said}}}")


def _atoms(statistics: Statistics) -> Iterator[Finding]:
    known = len(statistics.natoms)
    if known and not statistics.fixed_known:
        yield Finding(
            True, "no structure has 'fixed': losses and corruption need it (N,), 0 where an atom is free"
        )
    if statistics.all_fixed:
        yield Finding(
            False, f"{statistics.all_fixed} structures have no free atom: nothing to learn from their forces"
        )
    if known and not statistics.tags_known:
        yield Finding(False, "no structure has 'tags': the models here do not need them, others do")
    if known and len(statistics.identities) < known:
        yield Finding(
            False, f"{known - len(statistics.identities)} structures have no 'sid', by which predictions are "
            "told apart",
        )  # fmt: skip
    if statistics.elements and statistics.elements[-1] >= _DEFAULT_MAX_NUM_ELEMENTS:
        heaviest = statistics.elements[-1]
        yield Finding(
            False, f"{references.symbol(heaviest)} is among the elements: set model.max_num_elements to at "
            f"least {heaviest + 1}",
        )  # fmt: skip


def _duplicates(inspection: Inspection, place_of: Locate) -> Iterator[Finding]:
    pairs = list(inspection.statistics.duplicates())
    if not pairs:
        return
    shown = "; ".join(
        " and ".join(f"{index} of '{file}'" for file, index in map(place_of, p)) for p in pairs[:3]
    )
    where = "" if inspection.complete else " among those read"
    yield Finding(
        True, f"{len(pairs)} structures{where} repeat the (sid, fid) of another, first: {shown}; "
        "predictions on them cannot be told apart",
    )  # fmt: skip


def _molecular_dynamics(source: Source) -> Iterator[Finding]:
    if source.format != "dens_lmdb" or not source.files:
        return
    with suppress(ValueError):  # of a file that is damaged, which is said elsewhere
        dataset = open_part(source.settings, None)
        try:
            dataset.check_md_logs()
        except ValueError as error:
            yield Finding(source.corrupted, str(error))


def _settings(inspection: Inspection) -> Iterator[Finding]:
    """What the YAML says about the labels, against what they are."""
    statistics = inspection.statistics
    coefficients = file_references(inspection.source)
    if coefficients is not None:
        missing = references.without_reference(statistics.elements, coefficients)
        if missing:
            where = "transforms.element_references.energy.file"
            said = references.describe_elements(missing, coefficients)
            yield Finding(True, f"'{where}' has no usable reference for elements in the data: {said}")
            return
    normalizers = (inspection.source.settings.get("transforms") or {}).get("normalizer") or {}
    for name, seen in _targets(statistics, coefficients).items():
        given = normalizers.get(name) or {}
        if {"mean", "rmsd"} <= given.keys():
            for warning in summary.target_warnings(name, seen, float(given["mean"]), float(given["rmsd"])):
                yield Finding(False, warning)


def file_references(source: Source) -> np.ndarray | None:
    """Return the coefficients that the YAML of a source names, (Z,), None if it names none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a file of references.
    """
    settings = (source.settings.get("transforms") or {}).get("element_references")
    where = "dataset.train.transforms.element_references"
    references.check_settings(settings, where)
    file = ((settings or {}).get(keys.ENERGY) or {}).get("file")
    if file is None or not str(file).endswith(".npz"):
        return None
    return references.read_references(file, f"'{where}.{keys.ENERGY}.file'")


def _targets(statistics: Statistics, coefficients: np.ndarray | None) -> dict[str, summary.Target]:
    seen = {}
    if statistics.energies and statistics.fit.count:
        complete = None if coefficients is None else references.padded(coefficients)
        values = np.array(statistics.energies)
        mean, rmsd = (values.mean(), values.std()) if complete is None else statistics.fit.residual(complete)
        seen[keys.ENERGY] = summary.Target(len(values), float(mean), float(rmsd))
    if statistics.force_atoms:
        seen[keys.FORCES] = summary.Target(statistics.force_structures, 0.0, statistics.forces_rms)
    return seen


def _largest_forces(inspection: Inspection, place_of: Locate) -> Iterator[Finding]:
    statistics = inspection.statistics
    if inspection.source.labels.unit != "eV":
        return  # what is large, is known in eV
    if statistics.large_forces > _MANY * statistics.force_structures:
        yield Finding(
            False, f"forces are above {LARGE_FORCE:g} eV/Å in {statistics.large_forces} structures: if they "
            "are in kcal/mol/Å, so must be all else",
        )  # fmt: skip
    elif statistics.large_forces:
        file, index = place_of(statistics.force_max_place)
        yield Finding(
            False, f"{statistics.large_forces} structures have a force above {LARGE_FORCE:g} eV/Å, the "
            f"largest, {statistics.force_max:.4g} eV/Å, in {index} of '{file}': they dominate a loss",
        )  # fmt: skip
