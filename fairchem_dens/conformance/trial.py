"""A model on trial: the batches that it is given, and leaving no trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt

Outputs = dict[str, Tensor]

_CORRUPTION = Corruption(prob=1.0, std=0.05, corrupt_ratio=0.5, all_atoms=True)


class BrokenContractError(Exception):
    """A contract is broken; says what was found."""


@dataclass(frozen=True)
class Trial:
    """A model, and the same structures in four states.

    Attributes:
        model: the model.
        plain: as a data set gives them, without any DeNS field.
        ordinary: with all DeNS fields, nothing in them.
        mixed: every other one corrupted, the first among them; the others as in ``ordinary``.
        corrupted: all corrupted.
        tolerance: largest difference that counts as rounding, relative to the largest value.
    """

    model: nn.Module
    plain: Batch
    ordinary: Batch
    mixed: Batch
    corrupted: Batch
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, tolerance: float) -> Trial:
        """Corrupt the structures of a batch.

        Raises:
            ValueError: it is no batch of two structures or more, or one of them has no forces.
        """
        plain = _structures(batch)
        ordinary = [_as_armed(data, selected=False) for data in plain]
        corrupted = [_as_armed(data, selected=True) for data in plain]
        mixed = [both[place % 2] for place, both in enumerate(zip(corrupted, ordinary, strict=True))]

        def collated(structures: list[Data]) -> Batch:
            return Batch.from_data_list(structures).to(_device(model))

        return cls(
            model, collated(plain), collated(ordinary), collated(mixed), collated(corrupted), tolerance
        )

    def run(self, batch: Batch, *, training: bool = False) -> Outputs:
        """Predict.

        Raises:
            BrokenContractError: the model raises something.
        """
        self.model.train(training)
        try:
            with torch.set_grad_enabled(training):
                return self.model(batch)  # type: ignore[no-any-return]
        except Exception as error:
            raise BrokenContractError(f"{mode(batch, training)} it raises {said(error)}") from error

    def modes(self) -> Iterator[tuple[Batch, bool]]:
        """Give copies of a batch without and with conditioning, each for evaluation and for training."""
        for training in (False, True):
            for batch in (self.plain, self.mixed):
                yield batch.clone(), training

    def compare(self, what: str, batch: Batch, found: Outputs, expected: Outputs) -> None:
        """Raise if two predictions of a batch differ."""
        for name in (name for name in expected if name in found):
            size = float(expected[name].detach().abs().max())
            for place, change in enumerate(changes(name, batch, found, expected)):
                if not change <= self.tolerance * size:  # nor is nan
                    raise BrokenContractError(
                        f"{what} '{name}' of structure {place} differs by {change:.2g}; the largest value is "
                        f"{size:.2g}, and {self.tolerance:g} of it may be rounding"
                    )


def changes(name: str, batch: Batch, found: Outputs, expected: Outputs) -> list[float]:
    """Return the largest difference of an output in each structure."""
    sizes = 1 if name == keys.ENERGY else batch[keys.NATOMS].tolist()
    return [float(rows.max()) for rows in (found[name] - expected[name]).detach().abs().split(sizes)]


def mode(batch: Batch, training: bool) -> str:
    """Say how a model is run."""
    conditioning = "with" if keys.CONDITION_FORCES in batch else "without"
    return f"in {'training' if training else 'evaluation'} {conditioning} '{keys.CONDITION_FORCES}'"


def said(error: Exception) -> str:
    """Return what an error says, to be followed by a full stop."""
    return f"{type(error).__name__}: {error}".rstrip(".")


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, type and values, nan among them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back a model's modes, gradients, parameters and buffers, and torch's random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    contents = [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    device = _device(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, name, tensor, content in contents:
            setattr(module, name, tensor)
            if not identical(tensor, content):
                with torch.no_grad():
                    tensor.copy_(content)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _structures(batch: Batch) -> list[Data]:
    if not isinstance(batch, Batch) or batch.num_graphs < 2:
        found = "one of 1" if isinstance(batch, Batch) else f"a {type(batch).__name__}"
        raise ValueError(
            f"A model is validated on a torch_geometric Batch of two structures or more, found {found}: make "
            "it with Batch.from_data_list([...])."
        )
    structures: list[Data] = batch.clone().to_data_list()
    for place, data in enumerate(structures):
        for key in (*keys.DENS_FIELDS, keys.MD):
            if key in data:
                del data[key]
        forces = next((data[name] for name in keys.FORCES_ALIASES if name in data), None)
        if forces is None or not forces.any():
            raise ValueError(
                f"Structure {place} of the batch has {'no' if forces is None else 'only zeros for'} "
                f"'{keys.FORCES}': a model is validated on structures that it can be conditioned on."
            )
    return structures


def _as_armed(data: Data, *, selected: bool) -> Data:
    """Return a structure as it comes out of the armed transform; if selected, conditioned on some force."""
    for epoch in count():
        result: Data = corrupt(data, _CORRUPTION, seed=0, epoch=epoch, selected=selected)
        if not selected or result[keys.CONDITION_FORCES].any():
            break
    return result
