"""The errors that the paper reports, to stand beside one's own.

Sources: Liao, Smidt, Shuaibi and Das, "Generalizing Denoising to Non-Equilibrium Structures Improves
Equivariant Force Fields", TMLR 2024, arXiv 2403.09549, and the tables in the README files of its authors'
code (github.com/atomicarchitects/DeNS and github.com/atomicarchitects/equiformer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fairchem_dens.validation import nearest

SOURCE = "arXiv 2403.09549"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one split, in meV and meV/Å; None where nothing was reported.

    Attributes:
        group: what it is chosen by, such as ``oc20-2M-12ep``.
        split: what it was measured on, in words.
        model: the model, and whether it was trained with DeNS.
        energy_mae: meV.
        forces_mae: meV/Å.
        within_threshold: EwT, as a share.
    """

    group: str
    split: str
    model: str
    energy_mae: float
    forces_mae: float | None = None
    within_threshold: float | None = None


def _pair(
    group: str,
    split: str,
    model: str,
    without: tuple[float, float | None],
    with_dens: tuple[float, float | None],
    within_threshold: float | None = None,
) -> tuple[Row, Row]:
    return (
        Row(group=group, split=split, model=model, energy_mae=without[0], forces_mae=without[1]),
        Row(
            group=group,
            split=split,
            model=f"{model} + DeNS",
            energy_mae=with_dens[0],
            forces_mae=with_dens[1],
            within_threshold=within_threshold,
        ),
    )


_EQV2 = "EquiformerV2"
_OPEN_CATALYST = (
    *_pair("oc20-2M-12ep", "OC20 val", f"{_EQV2}, 2M, 12 epochs", (285, 20.46), (269, 19.09)),
    *_pair("oc20-2M-30ep", "OC20 val", f"{_EQV2}, 2M, 30 epochs", (278, 19.4), (251, 18.02)),
    *_pair("oc20-all-md", "OC20 val", f"{_EQV2}, All+MD", (227, 15.0), (222, 14.0)),
    *_pair("oc20-all-md", "OC20 test", f"{_EQV2}, All+MD", (219, 14.2), (214, 13.3)),
    *_pair("oc22", "OC22 val ID", _EQV2, (433, 22.88), (391.6, 20.66)),
    *_pair("oc22", "OC22 val OOD", _EQV2, (629, 30.70), (533.0, 27.11)),
    *_pair("oc22", "OC22 test ID", _EQV2, (263.7, 21.58), (236.4, 20.04)),
    *_pair("oc22", "OC22 test OOD", _EQV2, (659.8, 32.65), (590.7, 29.31)),
    *_pair("oc20-is2re", "OC20 IS2RE test", f"{_EQV2}, All+MD", (309, None), (293, None), 0.1878),
    *_pair("oc22-is2re", "OC22 IS2RE test ID", _EQV2, (1119, None), (951, None)),
    *_pair("oc22-is2re", "OC22 IS2RE test OOD", _EQV2, (1440, None), (1282, None)),
)

_MOLECULES = (
    *("aspirin", "benzene", "ethanol", "malonaldehyde"),
    *("naphthalene", "salicylic", "toluene", "uracil"),
)
_MD17 = {
    "Equiformer, L 2": "5.3/7.2 2.2/6.6 2.2/3.1 3.3/5.8 3.7/2.1 4.5/4.1 3.8/2.1 4.3/3.3",
    "Equiformer, L 2 + DeNS": "5.1/5.7 2.3/6.1 2.2/2.6 3.2/4.4 3.7/1.7 4.4/3.7 3.5/1.9 4.2/3.3",
    "Equiformer, L 3": "5.3/6.6 2.5/8.1 2.2/2.9 3.2/5.4 4.4/2.0 4.3/3.9 3.7/2.1 4.3/3.4",
    "Equiformer, L 3 + DeNS": "5.0/5.2 2.3/6.1 2.2/2.4 3.2/4.1 3.7/1.6 4.2/3.2 3.4/1.8 4.1/2.9",
}
"""Energy/force MAE on the test frames of MD17 with original labels, in the order of the molecules."""


def _md17() -> Iterable[Row]:
    for model, numbers in _MD17.items():
        for molecule, pair in zip(_MOLECULES, numbers.split(), strict=True):
            energy, forces = map(float, pair.split("/"))
            yield Row(
                group=f"md17-{molecule}",
                split=f"MD17 {molecule} test",
                model=model,
                energy_mae=energy,
                forces_mae=forces,
            )


ROWS: tuple[Row, ...] = (*_OPEN_CATALYST, *_md17())
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(row.group for row in ROWS))

_OC20_SPLITS = {"id", "ood_ads", "ood_cat", "ood_both"}
_OC22_SPLITS = {"id", "ood"}


def rows_of(groups: Iterable[str]) -> list[Row]:
    """Return the rows of some groups.

    Raises:
        ValueError: there is no such group; names the nearest.
    """
    chosen = list(groups)
    for group in chosen:
        if group not in GROUPS:
            raise ValueError(
                f"'--paper {group}' is nothing that the paper reports{nearest(group, GROUPS)}: it has "
                f"{', '.join(GROUPS)}."
            )
    return [row for row in ROWS if row.group in chosen]


def comparable(names: Iterable[str], molecules: Iterable[str | None], *, relaxed: bool) -> list[Row]:
    """Return the rows that splits of these names and molecules are measured on.

    Args:
        names: of the splits; those of OC20 and OC22 are known with ``val_`` in front and without.
        molecules: of each split, the molecule if it is MD17 with original labels, else None.
        relaxed: whether energies of relaxed structures are measured.
    """
    splits = {name.removeprefix("val_") for name in names}
    known = sorted({molecule for molecule in molecules if molecule in _MOLECULES})
    if known:
        return rows_of(f"md17-{molecule}" for molecule in known)
    if splits == _OC20_SPLITS:
        rows = rows_of(["oc20-is2re"] if relaxed else ["oc20-2M-12ep", "oc20-2M-30ep", "oc20-all-md"])
    elif splits == _OC22_SPLITS:
        rows = rows_of(["oc22-is2re"] if relaxed else ["oc22"])
    else:
        rows = []
    # Whoever has labels has those of a validation split; of relaxations only the test was reported.
    return [row for row in rows if relaxed or " val" in row.split]
