"""Score energies and forces of a checkpoint on labelled structures."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import numpy as np

from fairchem_dens import keys
from fairchem_dens.evaluation.metrics import S2EFMetrics
from fairchem_dens.evaluation.sample import Pairs
from fairchem_dens.evaluation.scorecard import Score
from fairchem_dens.evaluation.splits import Split
from fairchem_dens.inference import Prediction, predictions
from fairchem_dens.trainer import DeNSTrainer

_AT_ONCE = 256


def score(trainer: DeNSTrainer, split: Split, *, progress: str = "") -> Score:
    """Predict a split and compare with its labels.

    A structure without a free atom counts in no metric, as in fairchem's validation with this trainer.

    Args:
        trainer: see `fairchem_dens.inference.trainer_of`.
        split: the data.
        progress: what the progress bar says; empty shows none.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: the data has no labels, or no structure with a free atom, or a prediction is not finite.
    """
    compared = _Compared(split)
    # An error must not leave the progress bar open: its message would go into the same line.
    with contextlib.closing(predictions(trainer, split.source, progress=progress)) as predicted:
        checked = _checked(predicted, trainer, split)
        while chunk := list(itertools.islice(checked, _AT_ONCE)):
            compared.add(chunk)
    return compared.score()


class _Compared:
    """What is known about the structures of a split so far."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._metrics, self._energies, self._forces = S2EFMetrics(), Pairs(), Pairs()
        self._structures = self._free_atoms = self._left_out = 0

    def add(self, predicted: list[Prediction]) -> None:
        """Compare some more with their labels."""
        counted = [prediction for prediction in predicted if not prediction.fixed.all()]
        self._left_out += len(predicted) - len(counted)
        if not counted:
            return
        natoms = np.array([int((~prediction.fixed).sum()) for prediction in counted])
        self._structures += len(counted)
        self._free_atoms += int(natoms.sum())
        energies, true_energies = (
            self._split.in_ev * np.array([getattr(prediction, name) for prediction in counted])
            for name in ("energy", "true_energy")
        )
        forces, true_forces = (
            self._split.in_ev
            * np.concatenate(
                [getattr(prediction, name)[~prediction.fixed] for prediction in counted], dtype=float
            )
            for name in ("forces", "true_forces")
        )
        self._metrics.add(energies, true_energies, forces, true_forces, natoms)
        self._energies.add(true_energies, energies)
        self._forces.add(true_forces, forces)

    def score(self) -> Score:
        """Return what came out."""
        if not self._structures:
            raise ValueError(
                f"The split '{self._split.name}' ('{self._split.path}') has no structure with a free atom."
            )
        return Score(
            split=self._split,
            metrics=self._metrics.means(),
            structures=self._structures,
            free_atoms=self._free_atoms,
            left_out=self._left_out,
            energies=self._energies.values(),
            forces=self._forces.values(),
        )


def _checked(predicted: Iterator[Prediction], trainer: DeNSTrainer, split: Split) -> Iterator[Prediction]:
    """Pass on what can be compared."""
    for prediction in predicted:
        for name, label in (
            (keys.ENERGY, prediction.true_energy),
            (keys.FORCES, prediction.true_forces),
        ):
            if label is None:
                found = ", ".join(sorted(trainer.test_dataset[0].keys()))
                raise ValueError(
                    f"The split '{split.name}' ('{split.path}') has no labels '{name}', so there is nothing "
                    f"to compare with (its structures have: {found}). Test splits of the leaderboards have "
                    "none: see `fairchem-dens submission`."
                )
        if not (math.isfinite(prediction.energy) and np.isfinite(prediction.forces).all()):
            raise ValueError(
                f"The prediction for structure {prediction.id} of the split '{split.name}' is not finite: "
                "the checkpoint is broken, or the structure is (atoms on top of each other?)."
            )
        yield prediction
