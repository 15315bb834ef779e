"""The dataset transform ``dens``, one structure at a time.

fairchem hands the transforms of the train split to val, test and relax too. Under its YAML settings alone the
transform therefore does nothing; `DeNSTrainer` arms it on the train split by putting an `ArmedCorruption` in
their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fairchem_dens.corruption import Corruption, corrupt


class ArmedCorruption:
    """Stands where the YAML settings of ``dens`` stood, on the train split of a DeNS trainer.

    Args:
        corruption: the settings.
        seed: seed of the run.
        epoch: returns the current epoch, from 0. Copies sent to spawned workers keep the epoch of that
            moment; workers live for one epoch.
    """

    def __init__(self, corruption: Corruption, seed: int, epoch: Callable[[], int]) -> None:
        self.corruption = corruption
        self.seed = seed
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._epoch()

    def __call__(self, data: Any) -> Any:
        """Return the structure with the five DeNS fields, corrupted if its coin says so."""
        # With one coin per batch the trainer decides; the structure gets the five fields with nothing in
        # them.
        selected = False if self.corruption.switch == "batch" else None
        return corrupt(data, self.corruption, seed=self.seed, epoch=self.epoch, selected=selected)

    def __reduce__(self) -> tuple[Any, ...]:
        return _frozen, (self.corruption, self.seed, self.epoch)


def _frozen(corruption: Corruption, seed: int, epoch: int) -> ArmedCorruption:
    return ArmedCorruption(corruption, seed, lambda: epoch)


def dens(data: Any, settings: Mapping[str, Any] | ArmedCorruption | None) -> Any:
    """Corrupt one structure where a DeNS trainer has armed the transform, else return it as it is.

    Args:
        data: a torch_geometric ``Data``; it is not changed.
        settings: what stands under ``transforms.dens``.

    Raises:
        ValueError: see `fairchem_dens.corruption.corrupt`.
    """
    if isinstance(settings, ArmedCorruption):
        return settings(data)
    return data
