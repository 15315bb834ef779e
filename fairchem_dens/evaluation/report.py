"""A scorecard as a table and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fairchem_dens
from fairchem_dens.evaluation import metrics, paper
from fairchem_dens.evaluation.scorecard import Score, Scorecard


class _Shown(NamedTuple):
    """How a metric is shown: its heading, unit, factor from eV or a share, and digits."""

    heading: str
    unit: str
    factor: float
    digits: int


_SHOWN: Mapping[str, _Shown] = {
    metrics.ENERGY_MAE: _Shown("energy MAE", "meV", 1000.0, 1),
    metrics.FORCES_MAE: _Shown("force MAE", "meV/Å", 1000.0, 2),
    metrics.FORCES_COSINE: _Shown("force cosine", "", 1.0, 4),
    metrics.EFWT: _Shown("EFwT", "%", 100.0, 2),
    metrics.EWT: _Shown("EwT", "%", 100.0, 2),
}
_THRESHOLDS = {
    metrics.EFWT: "EFwT: energy off by less than 20 meV, and every force component on a free atom by less "
    "than 30 meV/Å",
    metrics.EWT: "EwT: energy off by less than 20 meV",
}


def table(card: Scorecard) -> str:
    """Return the scorecard as text."""
    shown = [_SHOWN[name] for name in card.metrics]
    heading = ["split", "structures", *(f"{what.heading} {what.unit}".strip() for what in shown)]
    rows = [heading]
    for score in card.scores:
        rows.append([score.split.name, str(score.structures), *_cells(card.metrics, score.metrics)])
    mean = card.mean()
    if mean is not None:
        rows.append([f"mean of {len(card.scores)}", "", *_cells(card.metrics, mean)])
    of_paper = [[f"{row.split}: {row.model}", "", *_paper_cells(card, row)] for row in card.paper]
    widths = [max(len(row[column]) for row in rows + of_paper) for column in range(len(heading))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    if of_paper:
        lines += ["", f"The paper ({paper.SOURCE}):", *(_line(row, widths) for row in of_paper)]
    return "\n".join([*lines, "", *_notes(card)])


def as_data(card: Scorecard) -> dict[str, Any]:
    """Return the scorecard as what JSON can hold: numbers as in the table, unrounded."""
    mean = card.mean()
    return {
        "fairchem_dens": fairchem_dens.__version__,
        "units": {name: _unit(name) for name in card.metrics},
        "splits": {score.split.name: _score(card, score) for score in card.scores},
        "mean": None if mean is None else _in_units(card.metrics, mean),
        "paper": {
            "source": paper.SOURCE,
            "rows": [
                {
                    "split": row.split,
                    "model": row.model,
                    **{name: value for name, value in _of_paper(row).items() if name in card.metrics},
                }
                for row in card.paper
            ],
        },
    }


def _score(card: Scorecard, score: Score) -> dict[str, Any]:
    split = score.split
    return {
        "scored": card.scored[split.name],
        "data": str(split.path),
        "unit_of_data": split.unit,
        "structures": score.structures,
        "structures_without_free_atoms": score.left_out,
        **({} if score.free_atoms is None else {"free_atoms": score.free_atoms}),
        **_in_units(card.metrics, score.metrics),
    }


def _unit(name: str) -> str:
    unit = _SHOWN[name].unit
    return {"%": "share of structures", "": "1"}.get(unit, unit)


def _in_units(names: Sequence[str], values: Mapping[str, float]) -> dict[str, float]:
    """Energies in meV, forces in meV/Å; shares stay shares."""
    return {
        name: values[name] if _SHOWN[name].unit == "%" else values[name] * _SHOWN[name].factor
        for name in names
    }


def _of_paper(row: paper.Row) -> dict[str, float | None]:
    return {
        metrics.ENERGY_MAE: row.energy_mae,
        metrics.FORCES_MAE: row.forces_mae,
        metrics.EWT: row.within_threshold,
    }


def _cells(names: Sequence[str], values: Mapping[str, float]) -> list[str]:
    return [f"{values[name] * _SHOWN[name].factor:.{_SHOWN[name].digits}f}" for name in names]


def _paper_cells(card: Scorecard, row: paper.Row) -> list[str]:
    """The numbers of a row, rounded no further than the paper rounds them."""
    cells = []
    for name in card.metrics:
        value = _of_paper(row).get(name)
        share = _SHOWN[name].unit == "%"
        cells.append("–" if value is None else f"{100 * value:.2f}" if share else f"{value:g}")
    return cells


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _notes(card: Scorecard) -> list[str]:
    notes = []
    if metrics.FORCES_MAE in card.metrics:
        notes.append("forces: over free atoms; MAE over components, cosine over atoms")
    notes += [text for name, text in _THRESHOLDS.items() if name in card.metrics]
    for score in card.scores:
        if score.split.in_ev != 1.0:
            notes.append(f"{score.split.name}: labels in {score.split.unit}, here in meV")
        if score.left_out:
            notes.append(f"{score.split.name}: structures left out for having no free atom: {score.left_out}")
    return notes
