"""What many structures hold together: counts and moments that add up, whoever counted which of them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import iadd

import numpy as np

from fairchem_dens.data.examine import NUM_ELEMENTS, Facts, FieldForm
from fairchem_dens.data.settings_file import Scale

LARGE_FORCE = 50.0
"""eV/Å; relaxations that begin with atoms too close have a few, which dominate a loss."""
FORCE_BINS = np.logspace(-4, 3, 71)
"""Edges of the histogram of force norms, eV/Å; smaller and larger ones are counted in the outer bins."""


class CompositionFit:
    """Least squares of energies on the number of atoms of each element, in float64.

    Rows are folded into a triangular factor as they come (QR), which determines the same solution as all rows
    together and takes the same room however many there are. fairchem's own fit holds all of them in float32.
    """

    def __init__(self) -> None:
        self.count = 0
        self._triangle = np.zeros((0, NUM_ELEMENTS + 1))
        self._sums = np.zeros(NUM_ELEMENTS + 1)

    def add(self, compositions: np.ndarray, energies: np.ndarray) -> None:
        """Add structures.

        Args:
            compositions: (n, 119) atoms of each element.
            energies: (n,), eV.
        """
        rows = np.column_stack([compositions, energies]).astype(np.float64)
        self.count += len(rows)
        self._sums += rows.sum(axis=0)
        self._fold(rows)

    def merge(self, other: CompositionFit) -> None:
        """Add the structures of another fit."""
        self.count += other.count
        self._sums += other._sums
        self._fold(other._triangle)

    def _fold(self, rows: np.ndarray) -> None:
        self._triangle = np.asarray(np.linalg.qr(np.vstack([self._triangle, rows]), mode="r"))

    @property
    def seen(self) -> np.ndarray:
        """(119,) bool, the elements that occur."""
        return self._sums[:-1] > 0

    @property
    def rank(self) -> int:
        """Number of independent compositions; below the number of elements, single ones mean nothing."""
        return int(np.linalg.matrix_rank(self._triangle[:, :-1])) if self.count else 0

    def solve(self) -> np.ndarray:
        """Return the coefficients, (119,) eV; NaN for elements that do not occur: nothing determines them."""
        coefficients = np.full(NUM_ELEMENTS, np.nan)
        seen = np.flatnonzero(self.seen)
        coefficients[seen] = np.linalg.lstsq(self._triangle[:, seen], self._triangle[:, -1], rcond=None)[0]
        return coefficients

    def residual(self, coefficients: np.ndarray) -> tuple[float, float]:
        """Return mean and root mean square deviation from it, eV, of energies less references.

        Args:
            coefficients: (119,), finite for all elements that occur.
        """
        vector = np.append(-np.where(self.seen, coefficients, 0.0), 1.0)
        mean = float(self._sums @ vector) / self.count
        square = float(((self._triangle @ vector) ** 2).sum()) / self.count
        return mean, float(np.sqrt(max(square - mean**2, 0.0)))


@dataclass
class FormTally:
    """Fields of one name, type and number of dimensions."""

    count: int
    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    per_atom: bool

    def shape(self, has_shape: bool) -> str:
        """Describe the shape: ``N`` for the number of atoms, ``*`` for what differs otherwise."""
        if not has_shape:
            return ""
        sides = [
            "N" if axis == 0 and self.per_atom else str(low) if low == high else "*"
            for axis, (low, high) in enumerate(zip(self.smallest, self.largest, strict=True))
        ]
        return f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"


FormKey = tuple[str, int | None]
"""Type and number of dimensions (None for what is neither tensor nor array)."""


@dataclass
class Statistics:
    """What was seen in some structures; sums only grow, so those of several parts can be merged.

    Attributes:
        read: structures that were tried; ``opened`` of them could be read.
        problems: index within the whole set, and what is wrong.
        forms: by field name, the types it comes in.
        natoms, energies: one entry for each structure that has it; ``places`` has the indices of the first.
        identities: hash of (sid, fid); ``identity_places`` has their indices.
        element_atoms, element_structures: (119,).
        fixed_known: structures with ``fixed``; ``fixed_atoms`` of their ``fixed_of`` atoms are fixed.
        all_fixed: structures without a free atom.
        force_atoms: free atoms with forces, and sums over them.
    """

    read: int = 0
    opened: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    forms: dict[str, dict[FormKey, FormTally]] = field(default_factory=dict)
    natoms: array[int] = field(default_factory=lambda: array("i"))
    places: array[int] = field(default_factory=lambda: array("q"))
    energies: array[float] = field(default_factory=lambda: array("d"))
    energy_per_atom: float = 0.0
    identities: array[int] = field(default_factory=lambda: array("q"))
    identity_places: array[int] = field(default_factory=lambda: array("q"))
    element_atoms: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS, dtype=np.int64))
    element_structures: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS, dtype=np.int64))
    fixed_known: int = 0
    fixed_atoms: int = 0
    fixed_of: int = 0
    all_fixed: int = 0
    tags_known: int = 0
    tags: Counter[int] = field(default_factory=Counter)
    pbc: Counter[tuple[bool, bool, bool] | None] = field(default_factory=Counter)
    cells: Counter[str] = field(default_factory=Counter)
    md: Counter[bool | None] = field(default_factory=Counter)
    label_names: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)
    force_structures: int = 0
    force_atoms: int = 0
    force_square: float = 0.0
    force_norm_sum: float = 0.0
    force_max: float = 0.0
    force_max_place: int = -1
    large_forces: int = 0
    force_histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(FORCE_BINS) - 1, dtype=np.int64))
    fit: CompositionFit = field(default_factory=CompositionFit)

    def add(self, place: int, facts: Facts) -> tuple[np.ndarray, float] | None:
        """Count one structure.

        Args:
            place: its index within the whole set.
            facts: what it holds.

        Returns:
            Composition and energy, for the fit, where both are known.
        """
        self.read += 1
        self.opened += 1
        self.problems += [(place, text) for text in facts.problems]
        for name, form in facts.forms.items():
            self._add_form(name, form)
        self.label_names[facts.label_names] += 1
        if facts.natoms is None:
            return None
        self.natoms.append(facts.natoms)
        self.places.append(place)
        if facts.identity is not None:
            self.identities.append(facts.identity)
            self.identity_places.append(place)
        self.pbc[facts.pbc] += 1
        self.cells[facts.cell] += 1
        self.md[facts.md] += 1
        if facts.num_fixed is not None:
            self.fixed_known += 1
            self.fixed_atoms += facts.num_fixed
            self.fixed_of += facts.natoms
            self.all_fixed += facts.num_fixed == facts.natoms
        if facts.tags is not None:
            self.tags_known += 1
            self.tags.update(facts.tags)
        self._add_forces(place, facts)
        if facts.composition is not None:
            self.element_atoms += facts.composition
            self.element_structures += facts.composition > 0
        if facts.energy is None:
            return None
        self.energies.append(facts.energy)
        self.energy_per_atom += abs(facts.energy) / facts.natoms
        return None if facts.composition is None else (facts.composition, facts.energy)

    def _add_form(self, name: str, form: FieldForm) -> None:
        shape = form.shape or ()
        known = self.forms.setdefault(name, {})
        key = (form.kind, None if form.shape is None else len(shape))
        known[key] = _together(known.get(key), FormTally(1, shape, shape, form.per_atom))

    def _add_forces(self, place: int, facts: Facts) -> None:
        norms = facts.force_norms
        if norms is None:
            return
        self.force_structures += 1
        self.force_square += facts.force_square
        if not len(norms):
            return
        self.force_atoms += len(norms)
        self.force_norm_sum += float(norms.sum())
        largest = float(norms.max())
        self.large_forces += largest > LARGE_FORCE
        if largest > self.force_max:
            self.force_max, self.force_max_place = largest, place
        inside = np.clip(norms, FORCE_BINS[0], FORCE_BINS[-1])
        self.force_histogram += np.histogram(inside, FORCE_BINS)[0]

    def merge(self, other: Statistics) -> None:
        """Add what another part saw."""
        for name, forms in other.forms.items():
            known = self.forms.setdefault(name, {})
            for key, tally in forms.items():
                known[key] = _together(known.get(key), tally)
        if other.force_max > self.force_max:
            self.force_max, self.force_max_place = other.force_max, other.force_max_place
        self.fit.merge(other.fit)
        for name in _SUMMED:
            # In place: arrays of millions of entries are not copied with each part.
            setattr(self, name, iadd(getattr(self, name), getattr(other, name)))

    # ------------------------------------------------------------------ what follows from it

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Yield index pairs of structures with the same (sid, fid), the first of its kind named first."""
        places, identities = np.array(self.identity_places), np.array(self.identities)
        order = np.lexsort((places, identities))
        _, starts, kinds = np.unique(identities[order], return_index=True, return_inverse=True)
        repeated = np.ones(len(order), dtype=bool)
        repeated[starts] = False
        pairs = np.column_stack([places[order][starts[kinds]], places[order]])[repeated]
        yield from map(tuple, pairs[pairs[:, 1].argsort()].tolist())

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that occur."""
        return np.flatnonzero(self.element_atoms).tolist()

    def energy_scale(self, references: np.ndarray | None = None) -> Scale:
        """Return the normaliser of the energies: mean and root mean square deviation from it, eV.

        Args:
            references: (119,) to subtract first.

        Raises:
            ValueError: there are no energies, or all are equal.
        """
        if not self.energies:
            raise ValueError("there are no energies")
        if references is not None and self.fit.count:
            return Scale(*self.fit.residual(references))
        energies = np.array(self.energies)
        return Scale(float(energies.mean()), float(energies.std()))

    def forces_scale(self) -> Scale:
        """Return the normaliser of the forces: mean 0 and the root mean square of free atoms' components.

        Raises:
            ValueError: there are no forces on free atoms, or all are 0.
        """
        if not self.force_atoms:
            raise ValueError("there are no forces on free atoms")
        return Scale(0.0, self.forces_rms)

    @property
    def forces_rms(self) -> float:
        """Root mean square of the components of forces on free atoms, eV/Å."""
        return float(np.sqrt(self.force_square / max(3 * self.force_atoms, 1)))

    def explained(self) -> float | None:
        """Share of the energies' variance that composition explains (R²); None where they do not vary."""
        energies = np.array(self.energies)
        if self.fit.count < 2 or energies.std() <= 1e-9 * max(1.0, float(np.abs(energies).max())):
            return None
        mean, rmsd = self.fit.residual(self.fit.solve())
        return 1 - (mean**2 + rmsd**2) / float(energies.var())


_SUMMED = (
    "read", "opened", "problems", "natoms", "places", "energies", "energy_per_atom", "identities",
    "identity_places", "element_atoms", "element_structures", "fixed_known", "fixed_atoms", "fixed_of",
    "all_fixed", "tags_known", "tags", "pbc", "cells", "md", "label_names", "force_structures", "force_atoms",
    "force_square", "force_norm_sum", "large_forces", "force_histogram",
)  # fmt: skip


def _together(one: FormTally | None, other: FormTally) -> FormTally:
    if one is None:
        return other
    return FormTally(
        one.count + other.count,
        tuple(map(min, one.smallest, other.smallest)),
        tuple(map(max, one.largest, other.largest)),
        one.per_atom and other.per_atom,
    )
