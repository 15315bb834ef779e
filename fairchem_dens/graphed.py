"""A training step as one CUDA graph: forward, forces, loss, backward, clipping, optimizer.

``optim.cuda_graph: True`` asks for it. It is for models and batches whose shapes do not change: molecules of
one size, as those of MD17, where launching thousands of small kernels takes longer than running them. The
arithmetic is that of an ordinary step. What changes from step to step, the learning rates and the coefficient
of the noise, is filled into tensors before each replay.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fairchem.core.common import distutils
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.cuda_graph import Recorded, Tensors
from fairchem_dens.training import finite

SETTING = "optim.cuda_graph"
_NOISE = "noise_coefficient"
_NORM = "grad_norm"
_LOSS = "loss"


class GraphedSteps:
    """The steps of a trainer, recorded for each shape of a batch.

    Args:
        trainer: a `DeNSTrainer`.
        recorded: makes what records from the function; None for CUDA.
    """

    loss: Tensor
    """Of the last step."""

    def __init__(self, trainer: Any, recorded: Any = Recorded.on_gpu) -> None:
        self._trainer = trainer
        self._recorded = recorded(self._step, trainer.device)
        self._largest = 1
        self._norm: Tensor | None = None
        set_capturable(trainer.optimizer, trainer.device.type == "cuda")

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Carry out a step.

        Returns:
            The predictions from before the update, without a gradient. The next step overwrites them.
        """
        trainer = self._trainer
        self._largest = int(batch[keys.NATOMS].max())
        batch.to(trainer.device, non_blocking=True)
        # The number makes shapes inside.
        tensors = {f"{name}/{self._largest}": batch[name] for name in self._fields(batch)}
        rates = {f"lr_{place}": float(group["lr"]) for place, group in enumerate(self._groups)}
        trainer._begin_update()
        coefficient = trainer._noise_coefficient if trainer.noise_loss is not None else 0.0
        results = self._recorded(tensors, rates | {_NOISE: coefficient})
        self.loss, self._norm = results[_LOSS], results[_NORM]
        return {name: value for name, value in results.items() if name not in (_LOSS, _NORM)}

    @contextlib.contextmanager
    def updated(self) -> Iterator[Tensor]:
        """Let `_backward` of the trainer keep its books: the update that it would make has been made.

        Yields:
            A loss to hand to it.
        """
        trainer, optimizer = self._trainer, self._trainer.optimizer
        trainer.optimizer = _Updated(self)
        try:
            yield self.loss.clone().requires_grad_()
        finally:
            trainer.optimizer = optimizer

    def take_norm(self) -> None:
        """Tell the trainer the norm of the gradient before it was clipped."""
        self._trainer._grad_norm = self._norm

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._trainer.optimizer.param_groups  # type: ignore[no-any-return]

    def _fields(self, batch: Any) -> list[str]:
        wanted = [keys.POS, keys.ATOMIC_NUMBERS, keys.NATOMS, keys.BATCH, keys.FIXED, *keys.DENS_FIELDS]
        wanted += [target for target, _ in self._trainer.loss_functions]
        wanted += list(self._trainer.output_targets)
        return [name for name in dict.fromkeys(wanted) if name in batch]

    def _step(self, tensors: Tensors, numbers: Tensors) -> Tensors:
        trainer, optimizer = self._trainer, self._trainer.optimizer
        batch = Data(**{name.split("/")[0]: one for name, one in tensors.items()})
        batch[keys.LARGEST] = self._largest
        out = self._predictions(trainer.model(batch), batch)
        with self._being_recorded(numbers[_NOISE]):
            loss = trainer._loss(out, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # The trainer clips, and passes over what is not finite, in a hook of the optimizer.
        with self._rates_of(numbers):
            optimizer.step()
        finite.forget_skip(optimizer)
        return {name: one.detach() for name, one in out.items()} | {
            _LOSS: loss.detach(),
            _NORM: trainer._grad_norm,
        }

    @contextlib.contextmanager
    def _being_recorded(self, noise_coefficient: Tensor) -> Iterator[None]:
        """Let the trainer compute a loss, with a coefficient of the noise that can be filled in later."""
        trainer, step = self._trainer, self._trainer._graphed_step
        trainer._graphed_step, trainer._filled_in_coefficient = None, noise_coefficient
        try:
            yield
        finally:
            trainer._graphed_step, trainer._filled_in_coefficient = step, None

    @contextlib.contextmanager
    def _rates_of(self, numbers: Tensors) -> Iterator[None]:
        """Let the optimizer read its learning rates from tensors; all others see the numbers."""
        rates = [group["lr"] for group in self._groups]
        for place, group in enumerate(self._groups):
            if group.get("capturable"):
                group["lr"] = numbers[f"lr_{place}"]
        try:
            yield
        finally:
            for group, rate in zip(self._groups, rates, strict=True):
                group["lr"] = rate

    def _predictions(self, raw: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        out = {}
        for target, settings in self._trainer.output_targets.items():
            rows = len(batch[keys.POS]) if settings["level"] == "atom" else len(batch[keys.NATOMS])
            out[target] = raw[target].view(rows, -1)
        return out | {keys.NOISE: raw[keys.NOISE]} if keys.NOISE in raw else out


class _Updated:
    """Stands in for an optimizer whose update has been made."""

    def __init__(self, steps: GraphedSteps) -> None:
        self._steps = steps
        self.param_groups: list[dict[str, Any]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Hand over what is known of the update."""
        self._steps.take_norm()


def set_capturable(optimizer: Optimizer, wanted: bool) -> None:
    """Keep what an optimizer counts on the device, or on the host.

    Args:
        optimizer: one of torch's that can; others stay as they are.
        wanted: on the device.
    """
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = wanted
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                fused = bool(group.get("fused"))
                device = parameter.device if wanted or fused else torch.device("cpu")
                state["step"] = state["step"].to(device=device, dtype=torch.float32)


def is_wanted(trainer: Any) -> bool:
    """Whether a trainer is to record its steps.

    Raises:
        ValueError: ``optim.cuda_graph`` is on but something of the run cannot be recorded; says what.
    """
    wanted = trainer.config["optim"].get("cuda_graph", False)
    if not isinstance(wanted, bool):
        raise ValueError(f"'{SETTING}' must be True or False, found {wanted!r}.")
    if not wanted:
        return False
    if trainer.device.type != "cuda":
        logging.info(f"'{SETTING}' has no effect without a GPU: steps are not recorded.")
        return False
    reason = why_not(trainer)
    if reason:
        raise ValueError(f"'{SETTING}: True' cannot be: {reason} Set it to False.")
    return True


def why_not(trainer: Any) -> str | None:
    """Say what of a run cannot be recorded; None if all can."""
    model = trainer._unwrapped_model
    if not hasattr(model, "has_static_shapes"):
        return f"steps of {type(model).__name__} wait for the device. It is for EquiformerDeNS."
    if distutils.get_world_size() > 1:
        return "there are several ranks, whose gradients are averaged in between."
    if trainer.scaler is not None or trainer.config["amp"]:
        return "mixed precision (--amp) is not supported."
    if any("capturable" not in group for group in trainer.optimizer.param_groups):
        name = type(trainer.optimizer).__name__
        return f"'optim.optimizer' is {name}, which cannot be recorded; AdamW can."
    if trainer.device.type == "cuda" and not finite.can_skip_on_device(trainer.optimizer):
        return "'optim.optimizer_params' choose an implementation of the optimizer other than 'fused'."
    if trainer.elementrefs:
        return "'element_references' are not supported."
    if any("decomposition" in settings for settings in trainer.output_targets.values()):
        return "an entry of 'outputs' has a 'decomposition'."
    return None
