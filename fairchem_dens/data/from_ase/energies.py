"""From energies of a file to energies that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers
from ase.formula import Formula

from fairchem_dens.data.references import (
    NUM_COEFFICIENTS,
    describe_elements,
    symbol,
    without_reference,
)
from fairchem_dens.data.statistics import CompositionFit

_IN_SPAN = 1e-6
"""Atoms of a formula that the fit's formulas cannot make up, above which it is not determined."""
_ROWS = 10_000
"""Structures that are folded into a fit at a time."""


def reference_energy(energies: np.ndarray, which: str) -> float:
    """Return the energy (eV) of a system's reference frame, among those that have one.

    Args:
        energies: (n,) in the order of the frames, not finite where there is none.
        which: ``last``, ``first`` or ``lowest``.

    Returns:
        Not a number if no frame has an energy.
    """
    known = energies[np.isfinite(energies)]
    if len(known) == 0:
        return float("nan")
    return float({"last": known[-1], "first": known[0], "lowest": known.min()}[which])


@dataclass(frozen=True)
class Fit:
    """Per-element references of total energies.

    Attributes:
        coefficients: (119,) eV by atomic number, 0 for elements that were not there.
        elements: atomic numbers that were there.
        rank: how many independent formulas there were; below the number of elements, only combinations of
            the coefficients mean something.
        mae: eV, what is left of the energies it was fitted to.
        rmse: eV, the same.
    """

    coefficients: np.ndarray
    elements: list[int]
    rank: int
    mae: float
    rmse: float


def counts_of(formulas: Sequence[str]) -> np.ndarray:
    """Return (n, 119) float64 numbers of atoms by atomic number."""
    counts = np.zeros((len(formulas), NUM_COEFFICIENTS))
    for row, formula in enumerate(formulas):
        for element, count in Formula(formula).count().items():
            counts[row, atomic_numbers[element]] = count
    return counts


def fit_references(formulas: Sequence[str], energies: np.ndarray, compositions: np.ndarray) -> Fit:
    """Fit a sum over atoms to energies by least squares, in double precision.

    Args:
        formulas: chemical formulas.
        energies: (n,) eV.
        compositions: (n,) place of a structure's formula in ``formulas``.

    Raises:
        ValueError: a coefficient is absurd.
    """
    counts = counts_of(formulas)
    fit = CompositionFit()
    for start in range(0, len(energies), _ROWS):
        rows = slice(start, start + _ROWS)
        fit.add(counts[compositions[rows]], energies[rows])
    coefficients = np.where(fit.seen, fit.solve(), 0.0)
    left = energies - (counts @ coefficients)[compositions]
    elements = np.flatnonzero(fit.seen).tolist()
    absurd = without_reference(elements, coefficients)
    if absurd:
        raise ValueError(
            f"'--energy referenced': the fit gives {describe_elements(absurd, coefficients)}, which is no "
            "reference. Give more formulas with these elements, or use --energy relative."
        )
    return Fit(
        coefficients,
        elements,
        fit.rank,
        mae=float(np.abs(left).mean()),
        rmse=float(np.sqrt(np.square(left).mean())),
    )


def undetermined(fit_formulas: Sequence[str], formulas: Sequence[str]) -> dict[str, str]:
    """Return those formulas, and why, whose energy a fit to other formulas does not determine.

    Args:
        fit_formulas: what the fit saw.
        formulas: what it is asked for.
    """
    seen = counts_of(fit_formulas)
    asked = counts_of(formulas)
    # Rows of `basis` span all that sums of the fit's formulas can be.
    _, sizes, basis = np.linalg.svd(seen, full_matrices=False)
    basis = basis[sizes > sizes.max() * max(seen.shape) * np.finfo(float).eps]
    outside = np.abs(asked - asked @ basis.T @ basis).max(axis=1) > _IN_SPAN
    why = {}
    for formula, counts, is_outside in zip(formulas, asked, outside.tolist(), strict=True):
        unseen = [symbol(number) for number in np.flatnonzero(counts * ~seen.any(axis=0)).tolist()]
        if unseen:
            why[formula] = f"{', '.join(unseen)} occurs in no formula of train"
        elif is_outside:
            why[formula] = "the formulas of train do not determine it"
    return why
