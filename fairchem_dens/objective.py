"""Loss and metrics of DeNS as pure functions on tensors.

Every supervised atom belongs to one of two disjoint sets: corrupted atoms, whose target is the noise, and the
others, whose target is the force. Sums run over masks and divide by counts that are kept away from zero, so
that an empty set contributes 0 with a zero gradient. Nothing here waits for the device.

Source: arXiv 2403.09549, equations 2 to 5 and section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fairchem_dens.validation import refuse_unknown_keys, require_mapping, require_number

Reduction = Literal["joint", "separate"]


@dataclass(frozen=True, kw_only=True)
class NoiseLoss:
    """The ``noise`` entry of ``loss_functions``.

    Attributes:
        coefficient: λ_N.
        fn: loss of one atom, a name in fairchem's registry of losses.
        reduction: ``joint`` takes one mean over forces and noise of all supervised atoms (OC20, OC22),
            ``separate`` one mean each (MD17).
        decay: ``linear`` takes λ_N to zero over the run, by epoch; None keeps it.
        decay_floor: share of λ_N that a linear decay stops at.
        where: YAML path, for error messages.

    Raises:
        ValueError: a value is impossible; names it.
    """

    coefficient: float
    fn: str = "l2mae"
    reduction: Reduction = "joint"
    decay: str | None = None
    decay_floor: float = 0.0
    where: str = "loss_functions.noise"

    def __post_init__(self) -> None:
        coefficient = require_number(self.coefficient, f"{self.where}.coefficient")
        if not math.isfinite(coefficient) or coefficient < 0:
            raise ValueError(
                f"'{self.where}.coefficient' must be finite and not negative, found {coefficient}."
            )
        if not isinstance(self.fn, str) or not self.fn:
            raise ValueError(f"'{self.where}.fn' must name a loss, such as l2mae, found {self.fn!r}.")
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"'{self.where}.reduction' must be 'joint' (one mean over forces and noise, as on OC20 and "
                "OC22) or 'separate' "
                f"(as on MD17), found {self.reduction!r}."
            )
        if self.decay not in (None, "linear"):
            raise ValueError(f"'{self.where}.decay' must be null or 'linear', found {self.decay!r}.")
        if not 0.0 <= require_number(self.decay_floor, f"{self.where}.decay_floor") <= 1.0:
            raise ValueError(
                f"'{self.where}.decay_floor' is a share of the coefficient, from 0 to 1, found "
                f"{self.decay_floor}."
            )
        if self.decay is None and self.decay_floor:
            raise ValueError(
                f"'{self.where}.decay_floor' has no effect without '{self.where}.decay: linear'."
            )

    @classmethod
    def from_config(
        cls, settings: Mapping[str, Any] | None, where: str = "loss_functions.noise"
    ) -> NoiseLoss:
        """Build from the YAML mapping.

        Raises:
            ValueError: an unknown key, a missing coefficient, or what the class itself refuses.
        """
        settings = require_mapping(settings, where)
        refuse_unknown_keys(settings, [field.name for field in fields(cls) if field.name != "where"], where)
        if "coefficient" not in settings:
            raise ValueError(f"'{where}.coefficient' is missing: λ_N of the paper, 10 on OC20 2M.")
        return cls(**settings, where=where)

    def coefficient_at(self, epoch: int, max_epochs: int) -> float:
        """Return λ_N in an epoch: λ_N · max(1 − epoch/max_epochs, floor) with linear decay, λ_N without.

        Args:
            epoch: epoch, whole, from 0.
            max_epochs: epochs of the whole run.
        """
        if self.decay is None:
            return self.coefficient
        return self.coefficient * max(1.0 - epoch / max(max_epochs, 1), self.decay_floor)


class SupervisedAtoms(NamedTuple):
    """Two disjoint masks (N,) bool that together cover every supervised atom."""

    forces: Tensor
    noise: Tensor


def supervised_atoms(
    noise_mask: Tensor, fixed: Tensor, *, free_atoms_only: bool, all_atoms: bool
) -> SupervisedAtoms:
    """Say which atoms have the force and which the noise as their target.

    Args:
        noise_mask: (N,) bool, corrupted atoms.
        fixed: (N,), non-zero on fixed atoms.
        free_atoms_only: fixed atoms are not supervised (``outputs.forces.train_on_free_atoms``).
        all_atoms: the corruption displaces fixed atoms as well; those that it did displace are supervised all
            the same.
    """
    noise_mask = noise_mask.bool()
    supervised = (fixed == 0) if free_atoms_only else torch.ones_like(noise_mask)
    if all_atoms:
        supervised = supervised | noise_mask
    return SupervisedAtoms(forces=supervised & ~noise_mask, noise=supervised & noise_mask)


def per_atom(loss: Tensor) -> Tensor:
    """Reduce an unreduced loss, (N,) or (N, 3), to one value for each atom: the mean of its components."""
    return loss if loss.dim() == 1 else loss.flatten(1).mean(dim=1)


class Errors(NamedTuple):
    """The errors of one target, before they are summed up.

    Attributes:
        values: (rows,) or (rows, D).
        mask: (rows,) bool, which rows count; None if all do.
        coefficient: λ of the target.
        mean: whether the loss is a mean over what counts on all ranks, or a sum.
    """

    values: Tensor
    mask: Tensor | None
    coefficient: float
    mean: bool = True


def sum_of_losses(
    errors: Sequence[Errors],
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
    num_ranks: int = 1,
) -> Tensor:
    """Return the sum of the losses of several targets.

    Args:
        errors: of each target, at least one.
        sum_over_ranks: adds up a tensor of counts over all ranks. Every rank must call it, with any number of
            rows.
        num_ranks: number of ranks whose gradients are averaged.

    Returns:
        A scalar. Averaged over ranks it is the loss of the global batch, as far as that is one of means.
    """
    totals, counts = [], []
    for values, mask, coefficient, _ in errors:
        width = values[0].numel() if len(values) else 1
        if mask is None:
            total, count = values.sum(), torch.full((), len(values), device=values.device)
        else:
            total = _masked_sum(values if values.dim() == 1 else values.flatten(1).sum(dim=1), mask)
            count = mask.sum()
        totals.append(coefficient * total)
        counts.append(count * width)
    over_ranks = sum_over_ranks(torch.stack(counts)).clamp(min=1)
    return torch.stack(
        [
            total * num_ranks / count if error.mean else total
            for error, total, count in zip(errors, totals, over_ranks.unbind(), strict=True)
        ]
    ).sum()


def force_and_noise_loss(
    force_errors: Tensor,
    noise_errors: Tensor,
    atoms: SupervisedAtoms,
    *,
    force_coefficient: float,
    noise_coefficient: float | Tensor,
    reduction: Reduction,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
    num_ranks: int = 1,
) -> Tensor:
    """Return the loss of forces and noise, section 3.3 of the paper.

    Args:
        force_errors: (N,), error of the normalised force of each atom.
        noise_errors: (N,), error of the noise of each atom, in units of σ.
        atoms: which error counts for which atom.
        force_coefficient: λ_F.
        noise_coefficient: λ_N, after any decay.
        reduction: one mean over all supervised atoms, or one mean for each of the two sets.
        sum_over_ranks: adds up a tensor of counts over all ranks. Every rank must call it, with any number of
            atoms.
        num_ranks: number of ranks whose gradients are averaged.

    Returns:
        A scalar. Averaged over ranks it is the loss of the global batch.
    """
    total_force = _masked_sum(force_errors, atoms.forces) * force_coefficient
    total_noise = _masked_sum(noise_errors, atoms.noise) * noise_coefficient
    counts = sum_over_ranks(torch.stack([atoms.forces.sum(), atoms.noise.sum()])).to(total_force.dtype)
    if reduction == "joint":
        loss = (total_force + total_noise) / counts.sum().clamp(min=1)
    else:
        loss = total_force / counts[0].clamp(min=1) + total_noise / counts[1].clamp(min=1)
    return loss * num_ranks


class Mean(NamedTuple):
    """A mean that is still to be taken: scalars, on the device or known on the host."""

    total: Tensor | float
    numel: Tensor | float


def denoising_metrics(
    *,
    energy: tuple[Tensor, Tensor],
    forces: tuple[Tensor, Tensor],
    noise: tuple[Tensor, Tensor],
    atoms: SupervisedAtoms,
    corrupted: Tensor,
    batch: Tensor,
) -> dict[str, Mean]:
    """Return the metrics of corrupted structures, each pair being (prediction, target) in physical units.

    Args:
        energy: (B,) or (B, 1), eV.
        forces: (N, 3), eV/Å.
        noise: (N, 3), Å: the prediction times σ.
        atoms: the atoms that are evaluated.
        corrupted: (B,) bool.
        batch: (N,), structure of each atom.

    Returns:
        ``denoising_energy_mae``, ``denoising_force_mae`` (over the atoms that were not corrupted) and
        ``denoising_pos_mae`` (over those that were), means over components. The number of elements may be 0:
        such a metric is to be left out.
    """
    on_atoms = corrupted[batch]
    energy_errors = (energy[0].reshape(-1) - energy[1].reshape(-1)).abs()

    def components(pair: tuple[Tensor, Tensor], mask: Tensor) -> Mean:
        return Mean(_masked_sum((pair[0] - pair[1]).abs().sum(dim=-1), mask), 3 * mask.sum())

    return {
        "denoising_energy_mae": Mean(_masked_sum(energy_errors, corrupted), corrupted.sum()),
        "denoising_force_mae": components(forces, atoms.forces & on_atoms),
        "denoising_pos_mae": components(noise, atoms.noise & on_atoms),
    }


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values)).sum()
