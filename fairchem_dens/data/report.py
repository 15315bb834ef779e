"""An inspection as text for a terminal of 80 columns, and as plain data for a program."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import yaml

from fairchem_dens.data.findings import file_references
from fairchem_dens.data.inspection import Finding, Inspection, Record
from fairchem_dens.data.label_kinds import guess_energies
from fairchem_dens.data.references import padded, symbol
from fairchem_dens.data.settings_file import Scale, dataset_settings
from fairchem_dens.data.statistics import Statistics

WIDTH = 80
_LABEL = 20


def describe(inspection: Inspection, *, shown: int | None = 20) -> str:
    """Return everything that is known about a source, as text.

    Args:
        inspection: of the source.
        shown: how many of the records that are wrong; None for all.
    """
    lines = [inspection.source.name, "=" * min(len(inspection.source.name), WIDTH)]
    lines += _rows(_facts(inspection))
    lines += ["", *_field_table(inspection.statistics)]
    lines += _wrong_records(inspection.records, shown)
    lines += _findings(inspection.findings)
    lines += ["", *_normalizer_lines(inspection)]
    return "\n".join(lines)


def _wrong_records(records: Sequence[Record], shown: int | None) -> list[str]:
    if not records:
        return []
    lines = ["", f"WRONG RECORDS ({len(records)})"]
    for file, group in groupby(records[:shown], key=attrgetter("file")):
        lines.append(f"  {file}")
        for record in group:
            place = "whole file" if record.index is None else f"record {record.index}"
            lines += _wrapped(f"{place}: {record.text}", "    ", "      ")
    if shown is not None and len(records) > shown:
        lines.append(f"  and {len(records) - shown} more (--all lists them)")
    return lines


def describe_findings(findings: list[Finding]) -> str:
    """Return findings as text."""
    return "\n".join(_findings(findings)).lstrip("\n")


def _findings(findings: list[Finding]) -> list[str]:
    lines: list[str] = []
    for title, problem in (("PROBLEMS", True), ("NOTES", False)):
        chosen = [finding for finding in findings if finding.problem is problem]
        if chosen:
            lines += ["", f"{title} ({len(chosen)})"]
            for finding in chosen:
                lines += _item(finding.text)
    return lines


def _item(text: str) -> list[str]:
    return _wrapped(text, "  - ", "    ")


def _rows(facts: Iterator[tuple[str, str]]) -> list[str]:
    rows = [_wrapped(value, f"  {label:{_LABEL}}", " " * (2 + _LABEL)) for label, value in facts]
    return [line for row in rows for line in row]


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(  # a path is in one piece, to be copied
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    statistics = inspection.statistics
    yield "format", inspection.source.format
    if inspection.files:
        yield "files", str(inspection.files)
    read = "all read" if inspection.complete else f"{statistics.read} read, evenly spread (--sample all: all)"
    yield "structures", f"{inspection.total}, {read}"
    if not statistics.natoms:
        return
    sizes = np.array(statistics.natoms)
    yield "atoms", f"{sizes.min()} / {np.median(sizes):g} / {sizes.max()} (min / median / max)"
    elements = ", ".join(
        f"{symbol(number)} {statistics.element_atoms[number]}" for number in statistics.elements
    )
    yield f"elements ({len(statistics.elements)})", elements or "unknown"
    if statistics.fixed_known:
        share = 100 * statistics.fixed_atoms / statistics.fixed_of
        yield "fixed atoms", f"{share:.1f} %"
    else:
        yield "fixed atoms", "unknown"
    tags = ", ".join(
        f"{tag}: {100 * count / statistics.tags.total():.1f} %"
        for tag, count in sorted(statistics.tags.items())
    )
    yield "tags", tags or "none"
    yield "periodicity", _counted({_axes(axes): count for axes, count in statistics.pbc.items()})
    yield "cells", _counted(statistics.cells)
    yield "MD frames", _counted({_MD[flag]: count for flag, count in statistics.md.items()})
    labels = inspection.source.labels
    if labels.kind is not None:
        yield "labels", labels.kind
    if statistics.energies:
        energies = np.array(statistics.energies)
        yield (
            f"energy, {labels.unit}",
            (
                f"mean {energies.mean():.6g}, std {energies.std():.4g}, from {energies.min():.6g} to "
                f"{energies.max():.6g}"
            ),
        )
        kind, reason = guess_energies(statistics, labels)
        yield "", f"a guess: {_KINDS[kind]} ({reason})"
    if statistics.force_atoms:
        mean = statistics.force_norm_sum / statistics.force_atoms
        yield (
            f"forces, {labels.unit}/Å",
            (
                f"rms component {statistics.forces_rms:.4g}, norm {mean:.4g} on average and at most "
                f"{statistics.force_max:.4g} (free atoms)"
            ),
        )


_MD = {True: "from MD", False: "from relaxations", None: "not told"}
_KINDS = {
    "total": "total energies",
    "referenced": "referenced energies, such as of adsorption",
    "unclear": "not clear, total or referenced",
}


def _axes(axes: tuple[bool, bool, bool] | None) -> str:
    if axes is None:
        return "not told"
    return "".join(name for name, periodic in zip("xyz", axes, strict=True) if periodic) or "none"


def _counted(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ordered[0][0] if len(ordered) == 1 else ", ".join(f"{name} ({count})" for name, count in ordered)


def _field_table(statistics: Statistics) -> list[str]:
    rows = [("field", "type", "shape", "structures")]
    for name, forms in sorted(statistics.forms.items()):
        for (kind, rank), form in forms.items():
            rows.append((name, kind, form.shape(rank is not None), str(form.count)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(f"{cell:{width}}" for cell, width in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    ]


# ------------------------------------------------------------------ normalisers


def scales(statistics: Statistics, coefficients: np.ndarray | None = None) -> tuple[Scale, Scale]:
    """Return the normalisers of energies, less references if given, and forces, to ten digits.

    A float32 label cannot tell more.

    Raises:
        ValueError: there are no labels, or they do not vary.
    """
    energy, forces = statistics.energy_scale(coefficients), statistics.forces_scale()
    return _rounded(energy), _rounded(forces)


def _own_scales(inspection: Inspection) -> tuple[Scale, Scale]:
    """Normalisers by the references that the YAML names, if it names any."""
    coefficients = file_references(inspection.source)
    return scales(inspection.statistics, None if coefficients is None else padded(coefficients))


def _normalizer_lines(inspection: Inspection) -> list[str]:
    """YAML to paste, as comments where it depends on a choice."""
    try:
        energy, forces = _own_scales(inspection)
    except ValueError as error:
        return _item(f"no normalisers: {error}")
    referenced = file_references(inspection.source) is not None
    lines = ["To paste into a YAML" + (" (energies less its references)" if referenced else "") + ":"]
    settings = dataset_settings(energy=energy, forces=forces)
    lines += yaml.safe_dump(settings, sort_keys=False).rstrip().splitlines()
    lines.append(f"# OC20's convention divides forces by the spread of energies: rmsd {energy.rmsd}")
    labels = inspection.source.labels
    if not referenced and guess_energies(inspection.statistics, labels)[0] == "total":
        left = inspection.statistics.energy_scale(inspection.statistics.fit.solve())
        lines.append(f"# Less fitted element references energies spread by {left.rmsd:.6g} {labels.unit}:")
        lines.append("#   fairchem-dens data fit-stats SRC --references fit --out FOLDER")
    return lines


def _rounded(scale: Scale) -> Scale:
    return Scale(float(f"{scale.mean:.10g}"), float(f"{scale.rmsd:.10g}"))


# ------------------------------------------------------------------ for programs


def as_data(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as what JSON can hold."""
    statistics = inspection.statistics
    sizes, energies = np.array(statistics.natoms), np.array(statistics.energies)
    labels = inspection.source.labels
    kind, reason = guess_energies(statistics, labels)
    data: dict[str, Any] = {
        "source": inspection.source.name,
        "format": inspection.source.format,
        "files": [str(file) for file in inspection.source.files],
        "labels": {"kind": labels.kind, "unit": labels.unit},
        "structures": inspection.total,
        "read": statistics.read,
        "healthy": inspection.healthy,
        "wrong_records": [vars(record) for record in inspection.records],
        "findings": [vars(finding) for finding in inspection.findings],
        "fields": {
            name: [
                {"type": type_, "shape": form.shape(rank is not None), "structures": form.count}
                for (type_, rank), form in forms.items()
            ]
            for name, forms in sorted(statistics.forms.items())
        },
        "atoms": _spread_of(sizes),
        "elements": {symbol(n): int(statistics.element_atoms[n]) for n in statistics.elements},
        "fixed_share": statistics.fixed_atoms / statistics.fixed_of if statistics.fixed_of else None,
        "tags": {str(tag): count for tag, count in sorted(statistics.tags.items())},
        "periodicity": {_axes(axes): count for axes, count in statistics.pbc.items()},
        "cells": dict(statistics.cells),
        "md": {_MD[flag]: count for flag, count in statistics.md.items()},
        "energy": {**_spread_of(energies), "kind": kind, "reason": reason},
    }
    if len(energies):
        data["energy"] |= {"mean": float(energies.mean()), "std": float(energies.std())}
    if statistics.force_atoms:
        data["forces"] = {
            "rms_component": statistics.forces_rms,
            "mean_norm": statistics.force_norm_sum / statistics.force_atoms,
            "max_norm": statistics.force_max,
        }
    with suppress(ValueError):  # no labels, or all the same
        energy, forces = _own_scales(inspection)
        data["normalizer"] = {"energy": asdict(energy), "forces": asdict(forces)}
    return data


def _spread_of(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {"min": values.min().item(), "median": float(np.median(values)), "max": values.max().item()}
