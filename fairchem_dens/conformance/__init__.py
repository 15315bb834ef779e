"""What a model must keep to if `fairchem_dens.trainer.DeNSTrainer` is to train it, checked on a small batch.

``docs/new_model.md`` says what each contract is for.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch_geometric.data import Batch

from fairchem_dens.conformance.contracts import CONTRACTS
from fairchem_dens.conformance.trial import BrokenContractError, Trial, undisturbed

__all__ = ["CONTRACTS", "broken_contracts", "validate_dens_model"]

_FOUNDATIONS = ("outputs", "repeatable")
"""Where one of these is broken, the contracts after it cannot be judged: they compare outputs."""


def validate_dens_model(model: nn.Module, batch: Batch, *, tolerance: float = 1e-4) -> None:
    """Check that a model keeps every contract. Model and batch are left as they were.

    Args:
        model: on any device.
        batch: two structures or more as a data set gives them, with ``forces``. Small ones of different sizes
            are quick and tell most. The check corrupts them by itself; DeNS fields that they have are not
            looked at.
        tolerance: largest difference between predictions that should be the same, relative to the largest
            value. The default suits single precision; TF32 and the like need more.

    Raises:
        ValueError: names the first contract that is broken and what was found; or the batch is of no use.
    """
    with undisturbed(model):
        for _contract, message in _broken(Trial.of(model, batch, tolerance)):
            raise ValueError(message)


def broken_contracts(model: nn.Module, batch: Batch, *, tolerance: float = 1e-4) -> dict[str, str]:
    """Return all contracts that a model breaks, with what was found; empty if it keeps every one.

    Where ``outputs`` or ``repeatable`` is broken it comes last: what follows compares outputs.

    Args:
        model: as for `validate_dens_model`.
        batch: as there.
        tolerance: as there.

    Raises:
        ValueError: the batch is of no use.
    """
    with undisturbed(model):
        return dict(_broken(Trial.of(model, batch, tolerance)))


def _broken(trial: Trial) -> Iterator[tuple[str, str]]:
    for contract, (sentence, check) in CONTRACTS.items():
        try:
            check(trial)
        except BrokenContractError as found:
            name = type(trial.model).__name__
            yield contract, f"{name} breaks the contract '{contract}' ({sentence}): {found}."
            if contract in _FOUNDATIONS:
                return
