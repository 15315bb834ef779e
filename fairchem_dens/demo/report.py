"""The demo's table and report: what was measured, whichever way it turned out."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import fairchem_dens
from fairchem_dens.demo.plan import Settings, stages, steps_per_epoch

_NOT_AVAILABLE = "n/a"
_SAME = 1.0  # percent; less than that is not worth a word


def table(results: Mapping[str, Any]) -> str:
    """Return the comparison as a table that reads well as text and as Markdown.

    Args:
        results: what ``results.json`` holds.
    """
    baseline, dens = results["baseline"], results["dens"]
    rows: list[tuple[str, ...]] = [("", "without DeNS", "with DeNS", "difference")]
    for split in ("val", "test"):
        rows += [
            _row(
                f"{split}: energy MAE, meV",
                baseline[split]["energy_mae"],
                dens[split]["energy_mae"],
                1000,
                ".1f",
            ),
            _row(
                f"{split}: force MAE, meV/Å",
                baseline[split]["forces_mae"],
                dens[split]["forces_mae"],
                1000,
                ".1f",
            ),
            _row(
                f"{split}: force cosine",
                baseline[split]["forces_cosine_similarity"],
                dens[split]["forces_cosine_similarity"],
                1,
                ".3f",
            ),
        ]
    noise = results["denoising"]
    rows += [
        ("val: denoising MAE, Å", _NOT_AVAILABLE, f"{noise['mae']:.4f}", f"{noise['mae_of_no_guess']:.4f} if no noise is guessed"),
        _row("training: force MAE at the end, meV/Å", baseline["train_forces_mae"], dens["train_forces_mae"], 1000, ".1f"),
        _row("training time, s", baseline["train_seconds"], dens["train_seconds"], 1, ".0f"),
    ]  # fmt: skip
    return _aligned(rows)


def _row(label: str, baseline: float, dens: float, scale: float, digits: str) -> tuple[str, ...]:
    if math.isnan(baseline) or math.isnan(dens):
        return (label, _NOT_AVAILABLE, _NOT_AVAILABLE, "")
    change = f"{100 * (dens - baseline) / abs(baseline):+.1f} %" if baseline else ""
    return (label, f"{scale * baseline:{digits}}", f"{scale * dens:{digits}}", change)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = f"|:{'-' * widths[0]}-|" + "".join(f"-{'-' * width}:|" for width in widths[1:])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def verdict(results: Mapping[str, Any]) -> str:
    """Say in words what the table shows on the test split."""

    def change(name: str) -> float:
        before, after = results["baseline"]["test"][name], results["dens"]["test"][name]
        return 100 * (after - before) / before

    energy, forces = change("energy_mae"), change("forces_mae")

    def said(what: str, percent: float) -> str:
        if abs(percent) < _SAME:
            return f"{what} the same within {_SAME:g} %"
        return f"{what} {abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}"

    text = f"On the test systems, with DeNS {said('the force error is', forces)} and {said('the energy error', energy)}."
    better = [name for name, percent in (("forces", forces), ("energies", energy)) if percent <= -_SAME]
    worse = [name for name, percent in (("forces", forces), ("energies", energy)) if percent >= _SAME]
    if better and worse:
        return f"{text} At this length of training DeNS paid for {better[0]} only."
    if worse:
        return f"{text} At this length of training DeNS did not pay."
    return text


REGIME = """\
DeNS takes half of the structures away from the ordinary task and gives them to another one, which the model
must learn as well. So it pays
late: where a model sees its data often enough to begin to memorise them, as in a long training or on little
    data. The sign of that
regime is a training error far below that of validation. In a short training on plenty of data the same
settings look worse than none. A few percent between two runs of one seed on a few hundred frames is noise; to
compare methods, train longer (`--budget long`) and with several seeds (`--seed`)."""


def write_report(settings: Settings, summary: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        settings: the demo's.
        summary: of the generated data.
        results: what ``results.json`` holds.
    """
    splits = summary["splits"]
    per_epoch = steps_per_epoch(splits["train"]["frames"])
    left_out: dict[str, int] = {}
    for split in splits.values():
        for reason, count in split["frames_left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    computed = sum(split["frames_computed"] for split in splits.values())
    said = "; ".join(f"{count} because of {reason}" for reason, count in left_out.items()) or "none"
    train = splits["train"]
    noise = results["denoising"]
    sizes = ", ".join(
        f"{name} {split['frames']} frames of {split['systems']} systems" for name, split in splits.items()
    )
    ends = results["baseline"]
    gap = ends["val"]["forces_mae"] / ends["train_forces_mae"] if ends["train_forces_mae"] else math.nan
    commands = "\n".join(stage.command for group in stages(settings) for stage in group)
    return f"""\
# Demo: EquiformerV2 with and without DeNS

{table(results)}

{verdict(results)}

Both runs: {settings.epochs} epochs of {per_epoch} steps, seed {settings.seed}, the same model, data, order of batches and learning rates; weights are
the moving average at the last step, no checkpoint was chosen by its error. Budget `{settings.budget}`. At the end the validation force error of the
run without DeNS was {gap:.1f} times that of its training.

## When DeNS pays
{REGIME}

## Pictures
![learning curves](curves.png)
![one structure clean, corrupted and denoised](structure.png)

## Data
Slabs of fcc metals and their alloys with small adsorbates, energies and forces from ASE's EMT: {sizes}; {train["atoms"][0]} to {train["atoms"][1]} atoms
in a training structure. No system is in two splits. Energies are those of adsorption: minus the relaxed clean slab, minus the adsorbate's atoms as
in H2, H2O, CO and N2. In training they spread by {1000 * train["energy_std"]:.0f} meV; the mean norm of the force on a free atom is
{1000 * train["force_mean_norm"]:.0f} meV/Å. Of {computed} computed frames these were left out before choosing: {said}.

EMT is a toy for H, C, N and O: these numbers compare two ways of training, they say nothing about catalysts.

## How it was measured
- Energy and force errors on val: `fairchem --mode validate`. On test: the predictions of `fairchem --mode predict` against the labels.
  Forces are those on free atoms; the force MAE is a mean over components.
- Denoising: each validation structure corrupted once with σ = {noise["std"]:g} Å, each free atom with probability {noise["corrupt_ratio"]:g}; the mean
  over components of |σ·predicted − true noise| of the {noise["atoms"]} corrupted atoms. Without DeNS the noise head is not trained.
- Training error: mean over the last epoch, while the weights change; with DeNS over the structures that were not corrupted.
- Training time: both runs at the same time, one core each, evaluations included.

Versions: fairchem_dens {fairchem_dens.__version__}, fairchem-core {version("fairchem-core")}, \
torch {version("torch")}, Python {platform.python_version()}.

## Commands
Run in this folder (`commands.txt` has them with their environment):
```
{commands}
```
"""
