"""Means over steps and ranks whose terms stay on the device until somebody prints them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fairchem.core.modules.evaluator import Evaluator
from torch import Tensor

from fairchem_dens.objective import Mean


class RunningMeans:
    """Adds up totals and numbers of elements by name.

    Each step adds the same names, on all ranks, with a number of elements that may be 0: the sum over ranks
    is then one collective of one tensor that all of them reach. A total that is not finite is left out
    together with its elements, so that one sick step does not hide all others.

    Args:
        device: where the terms are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._step: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, name: str, total: Tensor | float, numel: Tensor | float = 1) -> None:
        """Add a term of the step; nothing waits for it.

        Args:
            name: of the mean.
            total: scalar.
            numel: number of elements, scalar.
        """
        self._step[name] = (total, numel)

    def end_step(self) -> None:
        """Put the terms of the step to those of the steps before.

        Raises:
            ValueError: their names are not those of the steps before.
        """
        step, self._step = self._step, {}
        names = tuple(step)
        if self._sums is None:
            self._names = names
            self._sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self._device)
        if names != self._names:
            raise ValueError(f"A step has the means {names}, the steps before had {self._names}.")
        if not names:
            return
        terms = torch.stack([self._scalar(value) for pair in step.values() for value in pair]).view(-1, 2)
        finite = torch.isfinite(terms).all(dim=1, keepdim=True)
        self._sums += torch.where(finite, terms, torch.zeros_like(terms))

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Return the means so far, in fairchem's form, and begin anew. Waits for the device, once.

        Args:
            sum_over_ranks: adds up a tensor over all ranks; every rank calls this in the same step.

        Returns:
            ``metric``, ``total`` and ``numel`` by name, without the names that have no element.
        """
        if self._sums is None:
            return {}
        sums, self._sums = sum_over_ranks(self._sums), None
        return means_of(dict(zip(self._names, sums.tolist(), strict=True)))

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().reshape(()).to(device=self._device, dtype=torch.float64)
        # A kernel that fills: a copy from the host would wait.
        return torch.full((), float(value), dtype=torch.float64, device=self._device)


class RunningEvaluator(Evaluator):
    """fairchem's evaluator, which also puts numbers to `RunningMeans`, as tensors."""

    def update(self, key: str, stat: Any, metrics: Any) -> Any:
        """Add a number; see fairchem's class."""
        if isinstance(metrics, RunningMeans):
            metrics.add(key, stat)
            return metrics
        return super().update(key, stat, metrics)


def unread(loss: Tensor) -> Tensor:
    """Make ``loss.item()``, which fairchem calls in each step, return the value on its device.

    Args:
        loss: scalar; the same tensor is returned.
    """
    value = loss.detach()
    loss.item = lambda: value  # type: ignore[method-assign,assignment,return-value]
    return loss


def on_host(means: dict[str, Mean]) -> dict[str, tuple[float, float]]:
    """Return total and number of elements of some means, with one transfer for all."""
    scalars = [torch.as_tensor(value).detach().double() for mean in means.values() for value in mean]
    numbers = torch.stack(scalars).tolist() if scalars else []
    return dict(zip(means, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def means_of(sums: dict[str, Iterable[float]]) -> dict[str, dict[str, float]]:
    """Return fairchem's form of (total, numel) pairs, without those that have no element."""
    return {
        name: {"metric": total / numel, "total": total, "numel": numel}
        for name, (total, numel) in sums.items()
        if numel
    }
