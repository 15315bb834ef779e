"""What kind of labels a data set has, and whether two sets have the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fairchem_dens.data.inspection import Finding, Inspection
from fairchem_dens.data.labels import Labelling
from fairchem_dens.data.statistics import Statistics

EV = Labelling()

_TOO_FAR = 3.0
"""Means of two sets further apart than so many of their standard deviations do not belong together."""
_MIN_PER_UNKNOWN = 5
_FORCE_RATIO = 10.0


def guess_energies(statistics: Statistics, labels: Labelling = EV) -> tuple[str, str]:
    """Guess whether energies are total or referenced.

    Args:
        statistics: of the energies.
        labels: what is on record about them.

    Returns:
        ``total``, ``referenced``, ``unclear`` or ``none``, and the reason.
    """
    if not statistics.energies:
        return "none", "there are no energies"
    per_atom = labels.ev * statistics.energy_per_atom / len(statistics.energies)
    explained = statistics.explained()
    size = f"mean |E|/N is {per_atom:.3g} eV"
    follows = (
        ""
        if explained is None
        else f", composition explains {100 * max(explained, 0):.1f} % of their variance"
    )
    if per_atom < 0.3:
        return "referenced", f"{size}, less than any bond{follows}"
    if per_atom > 50:
        return "total", f"{size}: all electrons, or kcal/mol{follows}"
    if per_atom >= 1.5 or (explained is not None and explained > 0.95):
        return "total", f"{size}, as of cohesion{follows}"
    return "unclear", f"{size}{follows}"


def compare(inspections: Sequence[Inspection]) -> list[Finding]:
    """Say where the labels of two sets, such as train and val, cannot be of one kind."""
    findings = []
    for index, one in enumerate(inspections):
        for other in inspections[index + 1 :]:
            names = f"'{one.source.name}' and '{other.source.name}'"
            findings += [Finding(True, f"{names}: {text}") for text in _contradictions(one, other)]
    return findings


def _contradictions(*both: Inspection) -> Iterator[str]:
    one, other = (inspection.statistics for inspection in both)
    labels = [inspection.source.labels for inspection in both]
    if labels[0].kind != labels[1].kind and None not in (labels[0].kind, labels[1].kind):
        yield f"labels are {labels[0].kind} in the first and {labels[1].kind} in the second"
    if labels[0].unit != labels[1].unit:
        yield f"energies are in {labels[0].unit} in the first and in {labels[1].unit} in the second"
        return
    unit = labels[0].unit
    if one.energies and other.energies:
        kinds = guess_energies(one, labels[0])[0], guess_energies(other, labels[1])[0]
        means, stds = zip(*((np.mean(s.energies), np.std(s.energies)) for s in (one, other)), strict=True)
        if set(kinds) == {"total", "referenced"}:
            yield f"energies are {kinds[0]} in the first and {kinds[1]} in the second"
        elif abs(means[0] - means[1]) > _TOO_FAR * max(stds):
            yield (
                f"mean energies are {means[0]:.6g} and {means[1]:.6g} {unit}, further apart than three times "
                f"their standard deviations, {stds[0]:.3g} and {stds[1]:.3g}: labels of two kinds?"
            )
        else:
            yield from _offset_after_fit(one, other, unit)
    if one.force_atoms and other.force_atoms:
        first, second = (s.force_square / s.force_atoms for s in (one, other))
        if first and second and not _FORCE_RATIO**-2 <= first / second <= _FORCE_RATIO**2:
            yield (
                f"forces differ in size, rms components are {np.sqrt(first / 3):.3g} and "
                f"{np.sqrt(second / 3):.3g} {unit}/Å: other units?"
            )


def _offset_after_fit(one: Statistics, other: Statistics, unit: str) -> Iterator[str]:
    """Two functionals give total energies that differ by little against their spread over compositions."""
    for fitted, judged in ((one, other), (other, one)):
        enough = fitted.fit.count >= _MIN_PER_UNKNOWN * max(fitted.fit.rank, 1)
        if not enough or not judged.fit.count or (judged.fit.seen & ~fitted.fit.seen).any():
            continue
        if fitted.fit.rank < int(fitted.fit.seen.sum()):
            continue  # it says nothing about other compositions
        coefficients = fitted.fit.solve()
        spread = fitted.fit.residual(coefficients)[1]
        offset, own = judged.fit.residual(coefficients)
        if abs(offset) > _TOO_FAR * max(spread, own):
            yield (
                f"references fitted to one leave the energies of the other off by {offset:.4g} {unit} on "
                f"average, with standard deviations of {spread:.3g} and {own:.3g} {unit}: labels of two "
                "kinds?"
            )
            return
