"""Steps whose loss or gradient is not finite: skipped on all ranks, reported, counted, in the end too many.

Nothing here waits for the device within a step. A loss that is not finite makes each of its gradients NaN;
the sum of gradients over ranks, which takes place anyway, tells all ranks; and the norm of the gradient,
which clipping needs anyway, tells the optimizer. A fused optimizer passes over the update on the device. On
a GPU the host learns of it one step later.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from fairchem.core.common import distutils
from torch import Tensor, nn
from torch.optim.adam import Adam
from torch.optim.adamw import AdamW
from torch.optim.optimizer import Optimizer

from fairchem_dens.errors import TooManyBadSteps
from fairchem_dens.training.in_flight import InFlight


def poisoned(loss: Tensor) -> Tensor:
    """Return the loss, such that none of its gradients is finite if it is not finite itself.

    The gradient of |x - y| is 0 where y is NaN: without this a sick rank would stay unnoticed by the others.
    """
    one = torch.ones_like(loss.detach())
    return loss * torch.where(torch.isfinite(loss.detach()), one, one * torch.nan)


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip the gradients in place and return their norm before that, a scalar on the device.

    Args:
        parameters: those of the optimizer.
        max_norm: None leaves the gradients as they are.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, torch.inf if max_norm is None else max_norm)


def can_skip_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer is one of torch's fused ones that look at ``found_inf`` on the device.

    Not SGD, whose momentum is uninitialised memory after a first step that was passed over.
    """
    knows = isinstance(optimizer, Adam | AdamW)
    return knows and all(group.get("fused") for group in optimizer.param_groups)


def skip_if(bad: Tensor, optimizer: Optimizer) -> None:
    """Make the update that is about to come do nothing if ``bad``; neither moments nor steps change then.

    Args:
        bad: scalar bool, on the device.
        optimizer: it is read on the host here, unless this is one that `can_skip_on_device`.
    """
    if can_skip_on_device(optimizer):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # torch's protocol of fused optimizers
    elif bool(bad):
        optimizer.zero_grad(set_to_none=True)  # no optimizer touches a parameter without a gradient


def forget_skip(optimizer: Optimizer) -> None:
    """Take back what `skip_if` has left; the update has been made or passed over."""
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf


class Late:
    """Numbers on their way from the device: asked for now, read later without draining it.

    Args:
        values: (K,) tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers, waiting for those of this object alone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Step:
    number: int
    seen: Late
    in_flight: InFlight | None
    outputs: Mapping[str, Tensor]


class BadSteps:
    """Keeps count of skipped steps, says which structures they had, and ends the run if they do not end.

    Args:
        limit: so many in a row are too many.
        delay: after how many further steps the host looks; the same on all ranks.

    Attributes:
        total: of this run, with what it resumed from.
        in_a_row: up to the last step that was looked at.
    """

    def __init__(self, limit: int, delay: int) -> None:
        self.total = self.in_a_row = 0
        self._limit, self._delay = limit, delay
        self._unseen: deque[_Step] = deque()

    def ended(
        self,
        step: int,
        *,
        bad: Tensor,
        loss: Tensor,
        in_flight: InFlight | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Take note of a step, and look at the one `delay` steps before.

        Args:
            step: its number.
            bad: scalar bool, whether it was skipped.
            loss: scalar, of this rank.
            in_flight: its batch.
            outputs: what the model gave.

        Raises:
            TooManyBadSteps: on all ranks.
        """
        seen = Late(torch.stack([bad.to(loss.device, torch.float64), loss.detach().double()]))
        self._unseen.append(_Step(step, seen, in_flight, outputs))
        while len(self._unseen) > self._delay:
            self._look_at(self._unseen.popleft())

    def finish(self) -> None:
        """Look at all steps that are left.

        Raises:
            TooManyBadSteps: on all ranks.
        """
        while self._unseen:
            self._look_at(self._unseen.popleft())

    def _look_at(self, step: _Step) -> None:
        bad, loss = step.seen.read()
        if not bad:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        names, sick = ([], []) if step.in_flight is None else _structures(step.in_flight, step.outputs)
        # Gradients are the same on all ranks, so all of them are here.
        reports = distutils.gather_objects((loss, names, sick))
        if distutils.is_master():
            logging.warning(_said(step.number, self.total, self.in_a_row, reports))
        if self.in_a_row >= self._limit:
            raise TooManyBadSteps(
                f"Loss or gradient were not finite in {self.in_a_row} steps in a row, up to step "
                f"{step.number} ('optim.max_bad_steps_in_a_row'). The structures are named above; the "
                "weights are those of the last good step. A lower 'optim.lr_initial' or "
                "'optim.clip_grad_norm', or a look at the data (fairchem-dens data check), may help."
            )


def _structures(in_flight: InFlight, outputs: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of all structures, and of those with a prediction that is not finite."""
    names = in_flight.names
    sick = torch.zeros(len(names), dtype=torch.bool)
    structure = torch.repeat_interleave(torch.arange(len(names)), in_flight.natoms)
    for value in outputs.values():
        rows = ~torch.isfinite(value.detach()).flatten(1).all(dim=1).cpu()
        if len(rows) == len(structure):
            sick[structure[rows]] = True
        elif len(rows) == len(names):
            sick |= rows
    return names, [name for name, is_sick in zip(names, sick.tolist(), strict=True) if is_sick]


def _said(step: int, total: int, in_a_row: int, reports: Iterable[tuple[float, list[str], list[str]]]) -> str:
    lines = [
        f"Step {step} skipped: loss or gradient is not finite ({in_a_row} in a row, {total} in this run). "
        "Its structures:"
    ]
    for rank, (loss, names, sick) in enumerate(reports):
        predictions = f"; predictions not finite: {', '.join(sick)}" if sick else ""
        lines.append(f"  rank {rank}, loss {loss:g}{predictions}; all: {', '.join(names)}")
    return "\n".join(lines)
