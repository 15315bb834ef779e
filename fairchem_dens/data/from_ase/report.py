"""What was done, as numbers and in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from fairchem_dens.data.from_ase.filters import Reason
from fairchem_dens.data.from_ase.plan import Plan, dropped, formulas_of
from fairchem_dens.data.from_ase.settings import Settings
from fairchem_dens.data.from_ase.systems import SPLITS
from fairchem_dens.data.statistics import LARGE_FORCE

HIGH_ENERGY = 10.0
"""eV above the reference frame from which on frames that are written are named."""
WIDE_SPREAD = 10.0
"""eV, deviation of total energies from which on references are suggested."""


def summarise(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Return settings, counts and statistics, ready for JSON.

    Energies are in eV and forces in eV/Å; ``free_force_rms`` is over the components of the forces on atoms
    that are not fixed.
    """
    labelled = np.isfinite(plan.frames["energy"]) & np.isfinite(plan.frames["max_force"])
    kept = plan.reasons == Reason.KEPT
    splits = {}
    for split in SPLITS:
        members = plan.members(split)
        if members.any():
            splits[split] = {
                "systems": len(np.unique(plan.systems.of_frame[members])),
                **_statistics(plan, members),
            }
    return {
        "settings": asdict(settings),
        "files": len(plan.sources),
        "unreadable": {
            str(source.path): part.unreadable
            for source, part in zip(plan.sources, plan.parts, strict=True)
            if part.unreadable
        },
        "systems": {
            "read": len(plan.systems.names),
            "written": len(plan.splits),
            "named_by": plan.systems.rules,
        },
        "frames": {
            "read": len(plan.frames),
            "written": int(kept.sum()),
            "dropped": dropped(plan.reasons, settings),
            "tags_by_rule": int(plan.frames["tags_by_rule"][kept].sum()),
        },
        "before_filters": _statistics(plan, labelled) if labelled.any() else {},
        "after_filters": _statistics(plan, kept),
        "splits": splits,
        "energy": {"kind": settings.energy, "says": _energy(settings), **_fit(plan)},
        "normalizers": {"energy": asdict(plan.energy), "forces": asdict(plan.forces)},
        "notes": _notes(plan, settings, kept),
    }


def _statistics(plan: Plan, members: np.ndarray) -> dict[str, Any]:
    frames, energies = plan.frames[members], plan.energies[members]
    free = int(frames["free"].sum())
    return {
        "frames": len(frames),
        "atoms": int(frames["natoms"].sum()),
        "free_atoms": free,
        "atoms_per_frame": [int(frames["natoms"].min()), int(frames["natoms"].max())],
        "energy_mean": float(energies.mean()),
        "energy_std": float(energies.std()),
        "energy_range": [float(energies.min()), float(energies.max())],
        "free_force_rms": float(np.sqrt(frames["free_squares"].sum() / (3 * free))) if free else 0.0,
        "largest_force": float(frames["max_force"].max()),
    }


def _energy(settings: Settings) -> str:
    return {
        "total": "as in the files",
        "relative": f"less that of the {settings.relative_to} frame of the system",
        "referenced": "as in the files; references by element, fitted to train, are taken off in training",
    }[settings.energy]


def _fit(plan: Plan) -> dict[str, Any]:
    if plan.fit is None:
        return {}
    return {
        "elements": len(plan.fit.elements),
        "rank": plan.fit.rank,
        "residual_mae": plan.fit.mae,
        "residual_rmse": plan.fit.rmse,
    }


def _notes(plan: Plan, settings: Settings, kept: np.ndarray) -> list[str]:
    """Say what the user may want to change."""
    notes = []
    large = kept & (plan.frames["max_force"] > LARGE_FORCE)
    high = kept & (plan.above > HIGH_ENERGY)
    if (large | high).any():
        notes.append(
            f"{(large | high).sum()} frames have a force above {LARGE_FORCE:g} eV/Å ({large.sum()}) or lie "
            f"more than {HIGH_ENERGY:g} eV above the {settings.relative_to} frame ({high.sum()}): they "
            f"widen the normalisers. To leave them out: --max-force {LARGE_FORCE:g} "
            f"--max-energy-above {HIGH_ENERGY:g}"
        )
    alone = np.bincount(plan.systems.of_frame, minlength=len(plan.systems.names)) == 1
    if settings.energy == "relative" and (count := int((alone[plan.systems.of_frame] & kept).sum())):
        notes.append(f"{count} frames are the only one of their system: their relative energy is 0.")
    _, compositions = formulas_of(plan.parts)
    several = len(np.unique(compositions[plan.members("train")])) > 1
    if settings.energy == "total" and several and plan.energy.rmsd > WIDE_SPREAD:
        notes.append(
            f"Total energies of different formulas deviate by {plan.energy.rmsd:.1f} eV: a model learns "
            "differences better with --energy referenced, or --energy relative for trajectories."
        )
    if plan.fit is not None and plan.fit.rank < len(plan.fit.elements):
        notes.append(
            f"The formulas of train determine {plan.fit.rank} combinations of {len(plan.fit.elements)} "
            "references, not each by itself: predicted energies can be right only for formulas that are "
            "combinations of those in train."
        )
    same = [source for source in plan.sources if ":" in source.name]
    if same and "file of a trajectory" in plan.systems.rules:
        notes.append(
            f"{len(same)} files are called like a file in another folder, such as {same[0].name}, and "
            "count as systems of their own. If one name is one system: --split-by 'regex:([^/]+)[.][^/]*$'"
        )
    if "val" not in plan.splits.values():
        notes.append("There is no val split: fairchem then keeps no best checkpoint.")
    return notes


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a short report."""
    frames, found = summary["frames"], summary["systems"]
    rules = ", ".join(f"{rule} ({count} frames)" for rule, count in found["named_by"].items())
    lines = [
        f"{summary['files']} files, {frames['read']} frames, {found['read']} systems by {rules}",
        *(f"  not read: {why}" for why in summary["unreadable"].values()),
        "",
        f"{'':7}{'systems':>8}{'frames':>9}{'atoms':>10}{'atoms/frame':>13}"
        f"{'energy mean':>13}{'std':>9}{'force rms':>11}{'largest':>9}",
    ]
    for split, values in summary["splits"].items():
        low, high = values["atoms_per_frame"]
        lines.append(
            f"{split:7}{values['systems']:8}{values['frames']:9}{values['atoms']:10}"
            f"{f'{low}-{high}':>13}{values['energy_mean']:13.3f}{values['energy_std']:9.3f}"
            f"{values['free_force_rms']:11.4f}{values['largest_force']:9.2f}"
        )
    lines += [
        "Energies in eV, forces in eV/Å: rms of the components on free atoms, largest norm on any atom.",
        "",
    ]
    left_out = frames["read"] - frames["written"]
    lines.append(f"left out: {left_out} frames of {frames['read']}")
    lines += [f"  {count:7} {reason}" for reason, count in frames["dropped"].items()]
    if left_out and summary["before_filters"]:
        before, after = summary["before_filters"], summary["after_filters"]
        lines.append(
            f"  force rms {before['free_force_rms']:.4f} before, {after['free_force_rms']:.4f} after; "
            f"energy std {before['energy_std']:.3f} before, {after['energy_std']:.3f} after"
        )
    lines.append(f"energies: {summary['energy']['says']}")
    if summary["energy"]["kind"] == "referenced":
        fit = summary["energy"]
        lines.append(
            f"  fit to train of {fit['elements']} elements (rank {fit['rank']}): left over mae "
            f"{fit['residual_mae']:.4f} eV, rmse {fit['residual_rmse']:.4f} eV"
        )
    written = summary["after_filters"]
    lines.append(f"fixed atoms: {written['atoms'] - written['free_atoms']} of {written['atoms']}")
    if frames["tags_by_rule"]:
        lines.append(f"tags: by the rule in {frames['tags_by_rule']} frames of {frames['written']}")
    energy, forces = summary["normalizers"]["energy"], summary["normalizers"]["forces"]
    lines += [
        f"normalisers of train: energy mean {energy['mean']:.6g}, rmsd {energy['rmsd']:.6g} eV; "
        f"forces mean 0, rmsd {forces['rmsd']:.6g} eV/Å (components on free atoms)",
        *(f"note: {note}" for note in summary["notes"]),
    ]
    return lines
