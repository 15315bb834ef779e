"""What a checkpoint scored: each split, their mean, and the paper's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fairchem_dens.evaluation.paper import Row
from fairchem_dens.evaluation.splits import Split


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was found on one split.

    Attributes:
        split: the data.
        metrics: by name, in eV and eV/Å, see `fairchem_dens.evaluation.metrics`.
        structures: how many were counted.
        free_atoms: how many atoms the force errors are means over; None where forces are not scored.
        left_out: structures without a free atom.
        energies: (n, 2), true and predicted energies of all structures or of a sample, eV.
        forces: (n, 2), the same for the components of forces, eV/Å; None where forces are not scored.
    """

    split: Split
    metrics: dict[str, float]
    structures: int
    free_atoms: int | None = None
    left_out: int = 0
    energies: np.ndarray
    forces: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """Scores of all splits.

    Attributes:
        scored: the checkpoint or the results that were scored, by split.
        metrics: names of the metrics, in the order of the columns.
        scores: one for each split.
        paper: rows to compare with.
    """

    scored: dict[str, str]
    metrics: Sequence[str]
    scores: Sequence[Score]
    paper: Sequence[Row] = field(default_factory=tuple)

    def mean(self) -> dict[str, float] | None:
        """Return the mean of each metric over the splits, as on the leaderboards; None of a single split."""
        if len(self.scores) < 2:
            return None
        return {name: statistics.fmean(score.metrics[name] for score in self.scores) for name in self.metrics}
