"""What becomes of each frame, decided before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairchem_dens.data.from_ase import systems
from fairchem_dens.data.from_ase.energies import (
    Fit,
    counts_of,
    fit_references,
    reference_energy,
    undetermined,
)
from fairchem_dens.data.from_ase.filters import Reason, describe, reasons_in_system
from fairchem_dens.data.from_ase.parts import Part
from fairchem_dens.data.from_ase.settings import Settings
from fairchem_dens.data.from_ase.sources import Source
from fairchem_dens.data.from_ase.systems import Systems
from fairchem_dens.data.settings_file import Scale


@dataclass(frozen=True)
class Plan:
    """What will be written, before anything is. All arrays have one entry for each frame that was read.

    Attributes:
        sources: files.
        parts: what was read from each.
        source: place of the frame's file in ``sources``.
        frames: of type `parts.FRAME`.
        systems: what belongs together.
        fids: of each frame in its system.
        reasons: why a frame is left out.
        above: eV above the system's reference frame.
        references: eV, energy of each system's reference frame.
        splits: split of each system; those of which no frame is left have none.
        energies: eV, as they will be written.
        fit: per-element references, if asked for.
        energy: normaliser of what the model sees of ``energies``.
        forces: normaliser of the forces.
    """

    sources: list[Source]
    parts: list[Part]
    source: np.ndarray
    frames: np.ndarray
    systems: Systems
    fids: np.ndarray
    reasons: np.ndarray
    above: np.ndarray
    references: np.ndarray
    splits: dict[str, str]
    energies: np.ndarray
    fit: Fit | None
    energy: Scale
    forces: Scale

    def members(self, split: str) -> np.ndarray:
        """(n,) bool: the frames of a split."""
        inside = np.array([self.splits.get(name) == split for name in self.systems.names], dtype=bool)
        return inside[self.systems.of_frame] & (self.reasons == Reason.KEPT)


def make_plan(sources: list[Source], read: list[Part], settings: Settings) -> Plan:
    """Decide on all frames.

    Args:
        sources: files.
        read: what was read from each.
        settings: what to do.

    Raises:
        ValueError: nothing is left to train on, or what was asked for is impossible; says why.
    """
    frames = np.concatenate([part.frames for part in read])
    if len(frames) == 0:
        raise ValueError(f"The {len(sources)} files hold no frame that can be read.")
    grouped = systems.group(sources, read, settings.split_by)
    fids = systems.number_frames(read, grouped, settings)
    systems.refuse_duplicates(sources, read, grouped, fids)
    above, references, reasons = _within_systems(frames, grouped, settings)
    kept = reasons == Reason.KEPT
    if not kept.any():
        raise ValueError(_nothing_left(reasons, settings))

    names = [grouped.names[system] for system in np.unique(grouped.of_frame[kept]).tolist()]
    splits = systems.assign(names, settings)
    train = np.array([splits.get(name) == "train" for name in grouped.names])[grouped.of_frame] & kept
    fit, seen = None, above if settings.energy == "relative" else frames["energy"]
    if settings.energy == "relative" and not above[train].any():
        raise ValueError(
            "'--energy relative' makes all energies 0: each system has one frame, or frames of one energy. "
            "Use --energy referenced or total, or say what a system is (--split-by)."
        )
    if settings.energy == "referenced":
        fit, seen = _referenced(read, frames, train, kept)
    free = int(frames["free"][train].sum())
    if free == 0:
        raise ValueError("All atoms of train are fixed: there is no force to learn. See '--fixed none'.")
    mean = float(seen[train].mean())
    return Plan(
        sources=sources,
        parts=read,
        source=np.repeat(np.arange(len(read)), [len(part.frames) for part in read]),
        frames=frames,
        systems=grouped,
        fids=fids,
        reasons=reasons,
        above=above,
        references=references,
        splits=splits,
        energies=above if settings.energy == "relative" else frames["energy"],
        fit=fit,
        energy=Scale(mean, float(np.sqrt(np.square(seen[train] - mean).mean()))),
        forces=Scale(0.0, float(np.sqrt(frames["free_squares"][train].sum() / (3 * free)))),
    )


def _within_systems(
    frames: np.ndarray, grouped: Systems, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each frame's energy above its reference, each system's reference energy, and each reason."""
    above, reasons = np.empty(len(frames)), frames["reason"].copy()
    references = np.empty(len(grouped.names))
    order = np.argsort(grouped.of_frame, kind="stable")
    ends = np.cumsum(np.bincount(grouped.of_frame, minlength=len(grouped.names)))
    for system, members in enumerate(np.split(order, ends[:-1])):
        references[system] = reference_energy(frames["energy"][members], settings.relative_to)
        above[members] = frames["energy"][members] - references[system]
        reasons[members] = reasons_in_system(reasons[members], above[members], settings)
    return above, references, reasons


def _nothing_left(reasons: np.ndarray, settings: Settings) -> str:
    counts = dropped(reasons, settings)
    said = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
    why = f"None of the {len(reasons)} frames is left ({said})."
    if set(np.unique(reasons).tolist()) <= {Reason.NO_ENERGY, Reason.NO_FORCES, Reason.NO_ATOMS}:
        why += (
            " DeNS needs energy and forces of every frame: the forces are an input of the model. If the "
            "files hold them under other names, give --energy-key and --forces-key."
        )
    return why


def dropped(reasons: np.ndarray, settings: Settings) -> dict[str, int]:
    """Count the frames that are left out by why."""
    counts = np.bincount(reasons, minlength=len(Reason)).tolist()
    return {
        describe(reason, settings): counts[reason]
        for reason in Reason
        if counts[reason] and reason != Reason.KEPT
    }


def _referenced(
    read: Sequence[Part], frames: np.ndarray, train: np.ndarray, kept: np.ndarray
) -> tuple[Fit, np.ndarray]:
    """Fit references to train; return them and all energies less them.

    Raises:
        ValueError: they do not determine the energy of a frame in val or test.
    """
    formulas, compositions = formulas_of(read)
    fit = fit_references(formulas, frames["energy"][train], compositions[train])
    fitted = [formulas[place] for place in np.unique(compositions[train]).tolist()]
    others = [formulas[place] for place in np.unique(compositions[kept & ~train]).tolist()]
    missing = undetermined(fitted, others) if others else {}
    if missing:
        said = "; ".join(f"{formula} ({why})" for formula, why in list(missing.items())[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"'--energy referenced': references fitted to train say nothing about {said}{more}, found in val "
            "or test. Use --energy relative, another --seed, or more systems."
        )
    return fit, frames["energy"] - (counts_of(formulas) @ fit.coefficients)[compositions]


def formulas_of(read: Sequence[Part]) -> tuple[list[str], np.ndarray]:
    """Return all formulas, and the place of each frame's among them."""
    places: dict[str, int] = {}
    of_frame = []
    for part in read:
        here = [places.setdefault(formula, len(places)) for formula in part.compositions]
        of_frame.append(np.array(here, dtype=np.int64)[part.frames["composition"]])
    return list(places), np.concatenate(of_frame)
