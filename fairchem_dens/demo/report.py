"""The demo's table and report: what was measured, whichever way it turned out."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import fairchem_dens
from fairchem_dens.demo.plan import RUNS, Settings, stages, steps_per_epoch

_NOT_AVAILABLE = "n/a"
_SAME = 1.0  # percent; less than that is not worth a word


def table(results: Mapping[str, Any]) -> str:
    """Return the comparison as a table that reads well as text and as Markdown.

    Args:
        results: what ``results.json`` holds.
    """
    baseline, dens = results["baseline"], results["dens"]

    def row(label: str, before: float, after: float, scale: float, digits: str) -> tuple[str, ...]:
        if math.isnan(before) or math.isnan(after):
            return (label, _NOT_AVAILABLE, _NOT_AVAILABLE, "")
        change = f"{100 * (after - before) / abs(before):+.1f} %" if before else ""
        return (label, f"{scale * before:{digits}}", f"{scale * after:{digits}}", change)

    metrics = (
        ("energy_mae", "energy MAE, meV", 1000, ".1f"),
        ("forces_mae", "force MAE, meV/Å", 1000, ".1f"),
        ("forces_cosine_similarity", "force cosine", 1, ".3f"),
    )
    noise = results["denoising"]
    error, seconds = "train_forces_mae", "train_seconds"
    return _aligned(
        [
            ("", "without DeNS", "with DeNS", "difference"),
            *(
                row(f"{split}: {label}", baseline[split][name], dens[split][name], scale, digits)
                for split in ("val", "test")
                for name, label, scale, digits in metrics
            ),
            (
                "val: denoising MAE, Å",
                _NOT_AVAILABLE,
                f"{noise['mae']:.4f}",
                f"{noise['mae_of_no_guess']:.4f} if no noise is guessed",
            ),
            (*row("train: force MAE, meV/Å", baseline[error], dens[error], 1000, ".1f")[:3], _gaps(results)),
            row("training time, s", baseline[seconds], dens[seconds], 1, ".0f"),
        ]
    )


def _gaps(results: Mapping[str, Any]) -> str:
    """How many times larger than on training data the force error is on validation data."""
    gaps = (results[run]["val"]["forces_mae"] / results[run]["train_forces_mae"] for run in RUNS)
    return "val is {:.1f} and {:.1f} times that".format(*gaps)


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

    text = (
        f"On the test systems, with DeNS {said('the force error is', forces)} "
        f"and {said('the energy error', energy)}."
    )
    better = [name for name, percent in (("forces", forces), ("energies", energy)) if percent <= -_SAME]
    worse = [name for name, percent in (("forces", forces), ("energies", energy)) if percent >= _SAME]
    if better and worse:
        return f"{text} At this length of training DeNS paid for {better[0]} only."
    if worse:
        return f"{text} At this length of training DeNS did not pay."
    return text


REGIME = """\
DeNS takes half of the structures away from the ordinary task and gives them to another one, which the model
must learn as well. So it pays late: where a model sees its data often enough to begin to memorise them, as in
a long training or on little data. The sign of that is a training error far below that of validation. In a
short training on plenty of data the same settings look worse than none. A few percent between two runs of one
seed on a few hundred frames is noise; to compare methods, train longer (`--budget long`), with several seeds
(`--seed`)."""


def write_report(settings: Settings, summary: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        settings: the demo's.
        summary: of the generated data.
        results: what ``results.json`` holds.
    """
    splits = summary["splits"]
    train = splits["train"]
    per_epoch = steps_per_epoch(train["frames"])
    sizes = ", ".join(
        f"{name} {split['frames']} frames of {split['systems']} systems" for name, split in splits.items()
    )
    left_out: Counter[str] = Counter()
    for split in splits.values():
        left_out.update(split["frames_left_out"])
    computed = sum(split["frames_computed"] for split in splits.values())
    reasons = "; ".join(f"{count} because of {reason}" for reason, count in left_out.items()) or "none"
    noise = results["denoising"]
    gap = results["baseline"]["val"]["forces_mae"] / results["baseline"]["train_forces_mae"]
    commands = "\n".join(stage.command for group in stages(settings) for stage in group)
    return f"""\
# Demo: EquiformerV2 with and without DeNS

{table(results)}

{verdict(results)}

Both runs: {settings.epochs} epochs of {per_epoch} steps, seed {settings.seed}, the same model, data, order of
batches and learning rates. Weights are the moving average at the last step; no checkpoint was chosen by its
error. Without DeNS the force error was at the end {gap:.1f} times as large on validation as on training data.

## When DeNS pays
{REGIME}

## Pictures
![learning curves](curves.png)
![one structure clean, corrupted and denoised](structure.png)

## Data
Slabs of fcc metals and their alloys with small adsorbates, energies and forces from ASE's EMT:
{sizes}; {train["atoms"][0]} to {train["atoms"][1]} atoms in a
training structure. No system is in two splits. Energies are those of adsorption: minus the relaxed clean
slab, minus the adsorbate's atoms as in H2, H2O, CO and N2. In the training split they spread by
{1000 * train["energy_std"]:.0f} meV; the mean norm of the force on a free atom is
{1000 * train["force_mean_norm"]:.0f} meV/Å. Of {computed} computed frames these were left out
before choosing: {reasons}.

EMT is a toy for H, C, N and O: these numbers compare two ways of training, they say nothing about catalysts.

## How it was measured
- Energy and force errors on val: `fairchem --mode validate`. On test: the predictions of
  `fairchem --mode predict` against the labels. Forces are those on free atoms; their MAE is a mean over
  components, the cosine one over atoms.
- Denoising: each validation structure corrupted once with σ = {noise["std"]:g} Å, each free atom with
  probability {noise["corrupt_ratio"]:g}; mean over components of |σ·predicted − true noise| of the
  {noise["atoms"]} corrupted atoms. Without DeNS there is no trained noise head.
- Training data: all training frames with the final weights.
- Training time: wall time with evaluations, both runs side by side where there are two cores, a thread each.

Budget `{settings.budget}`; fairchem_dens {fairchem_dens.__version__}, \
fairchem-core {version("fairchem-core")}, torch {version("torch")}, Python {platform.python_version()}.

## Commands
Run in this folder (`commands.txt` has them with their environment):
```
{commands}
```
"""
