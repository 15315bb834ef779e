"""The contracts: for each a sentence, and a function that raises where a model breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_geometric.data import Batch

from fairchem_dens import keys
from fairchem_dens.conformance.trial import (
    BrokenContractError,
    Outputs,
    Trial,
    changes,
    identical,
    mode,
    said,
)

_OUTPUTS = (keys.ENERGY, keys.FORCES, keys.NOISE)
_LABELS = (*keys.ENERGY_ALIASES, *keys.FORCES_ALIASES, keys.NOISE_VEC)
_ROUNDING = 10
"""A change by so many units in the last place of the largest value is none."""


def _refuse(names: Iterable[str], says: str) -> None:
    """Raise if there are any names; they stand where ``says`` has ``{}``."""
    found = list(names)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise BrokenContractError(says.replace("{}", f"'{found[0]}'{more}"))


def _takes_otf_graph(trial: Trial) -> None:
    parameters = inspect.signature(type(trial.model)).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if "otf_graph" not in parameters and not takes_any:
        raise BrokenContractError(f"it takes {', '.join(parameters) or 'nothing'}")


def _has_its_outputs(trial: Trial) -> None:
    for batch, training in trial.modes():
        outputs, num_atoms = trial.run(batch, training=training), len(batch[keys.POS])
        if not isinstance(outputs, dict):
            raise BrokenContractError(f"{mode(batch, training)} it returns a {type(outputs).__name__}")
        missing = {keys.ENERGY, keys.FORCES} - outputs.keys()
        _refuse(
            sorted(missing), f"{mode(batch, training)} there is no {{}} but {', '.join(map(str, outputs))}"
        )
        shapes = {keys.ENERGY: (batch.num_graphs,), keys.FORCES: (num_atoms, 3), keys.NOISE: (num_atoms, 3)}
        for name in (name for name in shapes if name in outputs):
            found = _unlike(outputs[name], shapes[name])
            if found:
                raise BrokenContractError(f"{mode(batch, training)} '{name}' {found}")


def _unlike(value: Any, shape: tuple[int, ...]) -> str:
    """Say what is wrong with an output; nothing if it is right."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.shape != shape:
        return f"has the shape {tuple(value.shape)} instead of {shape}"
    if not value.is_floating_point():
        return f"is of type {value.dtype}"
    return "" if value.isfinite().all() else "is not finite"


def _has_noise_where_it_should(trial: Trial) -> None:
    for batch, training in trial.modes():
        wanted = training or keys.CONDITION_FORCES in batch
        if (keys.NOISE in trial.run(batch, training=training)) != wanted:
            raise BrokenContractError(f"{mode(batch, training)} there is {'none' if wanted else 'some'}")


def _gives_every_parameter_a_gradient(trial: Trial) -> None:
    for batch, kind in (
        (trial.ordinary, "a batch without corrupted structures"),
        (trial.mixed, "a mixed batch"),
        (trial.corrupted, "a batch of corrupted structures"),
    ):
        trial.model.zero_grad(set_to_none=True)
        outputs = trial.run(batch.clone(), training=True)
        values = {name: outputs[name] for name in _OUTPUTS if name in outputs}
        _refuse((name for name, value in values.items() if not value.requires_grad), "{} cannot teach it")
        try:
            torch.stack([value.square().sum() for value in values.values()]).sum().backward()
        except RuntimeError as error:
            raise BrokenContractError(f"the backward pass of {kind} raises {said(error)}") from error
        gradients = {name: one.grad for name, one in trial.model.named_parameters() if one.requires_grad}
        _refuse(
            (name for name, one in gradients.items() if one is None),
            f"{kind} gives none to {{}}, and distributed training waits for it (add 0 times it to an "
            "output, or freeze it)",
        )
        _refuse(
            (name for name, one in gradients.items() if one is not None and not one.isfinite().all()),
            f"{kind} gives one that is not finite to {{}}",
        )


def _spares_the_noise_head(trial: Trial) -> None:
    parameters = {name: one for name, one in trial.model.named_parameters() if one.requires_grad}
    outputs = trial.run(trial.mixed.clone(), training=True)

    def reached(*names: str) -> set[str]:
        values = [outputs[name].sum() for name in names if name in outputs and outputs[name].requires_grad]
        if not values:
            return set()
        gradients = torch.autograd.grad(
            torch.stack(values).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        return {name for name, one in zip(parameters, gradients, strict=True) if one is not None}

    try:
        own = reached(keys.NOISE) - reached(keys.ENERGY, keys.FORCES)
    except RuntimeError as error:
        raise BrokenContractError(f"the backward pass raises {said(error)}") from error
    with _Uses({name: parameters[name] for name in own}) as uses:
        trial.run(trial.plain.clone())
    _refuse(uses.names, f"it computes with {{}}, which nothing but '{keys.NOISE}' depends on")


class _Uses(TorchDispatchMode):
    """Notes which of some parameters go into an operation."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        used = [self._names[id(one)] for one in tree_leaves((args, kwargs)) if id(one) in self._names]
        self.names += [name for name in used if name not in self.names]
        return func(*args, **(kwargs or {}))


def _leaves_the_batch_alone(trial: Trial) -> None:
    for batch, training in trial.modes():
        before = batch.clone().to_dict()
        trial.run(batch, training=training)
        after, how = batch.to_dict(), mode(batch, training)
        _refuse((name for name in before if name not in after), f"{how} it removes {{}}")
        _refuse((name for name in after if name not in before), f"{how} it adds {{}}")
        _refuse((name for name in before if not _same(before[name], after[name])), f"{how} it changes {{}}")


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return identical(before, after) and before.requires_grad == after.requires_grad
    return type(before) is type(after) and bool(before == after)


def _leaves_itself_alone(trial: Trial) -> None:
    model = trial.model
    for batch, training in trial.modes():
        model.zero_grad(set_to_none=True)
        before = {name: tensor.detach().clone() for name, tensor in _contents(model, training).items()}
        trial.run(batch, training=training)
        after, how = _contents(model, training), mode(batch, training)
        _refuse(
            (name for name, tensor in before.items() if not identical(tensor, after[name])),
            f"{how} it changes {{}}",
        )
        _refuse(
            (name for name, one in model.named_parameters() if one.grad is not None),
            f"{how} it leaves a gradient on {{}}, to which that of the loss would be added",
        )
        _refuse(
            (name or "model" for name, one in model.named_modules() if one.training is not training),
            f"{how} it switches {{}} to the other mode",
        )


def _contents(model: nn.Module, training: bool) -> dict[str, Tensor]:
    """Return what a forward pass must not change; in training a buffer may hold a running mean."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return parameters if training else parameters | dict(model.named_buffers())


def _repeats_itself(trial: Trial) -> None:
    for batch in (trial.plain, trial.mixed):
        first = trial.run(batch.clone())
        trial.compare("the second time", batch, trial.run(batch.clone()), first)


def _reads_no_labels(trial: Trial) -> None:
    for batch in (trial.plain, trial.mixed):
        without = batch.clone()
        for key in _LABELS:
            if key in without:
                del without[key]
        trial.compare("without 'energy' and 'forces'", batch, trial.run(without), trial.run(batch.clone()))


def _predicts_structures_as_if_alone(trial: Trial) -> None:
    for batch in (trial.plain, trial.mixed):
        alone = [trial.run(Batch.from_data_list([data])) for data in batch.clone().to_data_list()]
        expected = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
        try:
            trial.compare("in a batch", batch, trial.run(batch.clone()), expected)
        except BrokenContractError as found:
            raise BrokenContractError(
                f"{found} (fairchem's strict limit on neighbours does this where some are equally "
                "far: raise 'max_neighbors' for the check, or use structures without symmetry)"
            ) from found


def _takes_zeros_for_none(trial: Trial) -> None:
    without, zeros = (trial.run(batch.clone()) for batch in (trial.plain, trial.ordinary))
    trial.compare("with zeros", trial.plain, zeros, without)


def _turned_round(trial: Trial) -> Iterator[tuple[int, dict[str, list[float]], Outputs]]:
    """Turn round and double what one structure after another is conditioned on.

    Yields:
        The structure, the largest change of each output in each structure, and the outputs before.
    """
    batch = trial.corrupted
    before = trial.run(batch.clone())
    for place in range(batch.num_graphs):
        other = batch.clone()
        other[keys.CONDITION_FORCES][batch[keys.BATCH] == place] *= -2
        after = trial.run(other)
        yield (
            place,
            {name: changes(name, batch, after, before) for name in _OUTPUTS if name in before},
            before,
        )


def _rounding(value: Tensor) -> float:
    return _ROUNDING * torch.finfo(value.dtype).eps * float(value.detach().abs().max())


def _sees_its_conditioning(trial: Trial) -> None:
    encodes = getattr(trial.model, "use_force_encoding", True)
    for place, found, before in _turned_round(trial):
        seen = any(of_structures[place] > _rounding(before[name]) for name, of_structures in found.items())
        if seen and not encodes:
            raise BrokenContractError(
                f"structure {place} sees its own though the model's 'use_force_encoding' is {encodes}"
            )
        if encodes and not seen:
            raise BrokenContractError(
                f"structure {place} does not see its own (if their encoding starts from zeros, give it other "
                "weights before you validate; if they are hidden on purpose, set 'use_force_encoding' of the "
                "model to False)"
            )


def _sees_no_other_conditioning(trial: Trial) -> None:
    for place, found, before in _turned_round(trial):
        for name, of_structures in found.items():
            own = of_structures[place]
            allowed = max(trial.tolerance * own, _rounding(before[name]))
            for other, change in enumerate(of_structures):
                if other != place and change > allowed:
                    raise BrokenContractError(
                        f"those of structure {place} change '{name}' of structure {other} by {change:.2g}, "
                        f"its own by {own:.2g}"
                    )


CONTRACTS: Final[dict[str, tuple[str, Callable[[Trial], None]]]] = {
    "arguments": ("the constructor takes 'otf_graph', which OCPCalculator sets", _takes_otf_graph),
    "outputs": (
        "a dict with 'energy' (B,), 'forces' (N, 3) and, where there is one, 'noise' (N, 3), finite floats",
        _has_its_outputs,
    ),
    "noise": (
        "there is noise in training, and in evaluation with 'condition_forces', else none",
        _has_noise_where_it_should,
    ),
    "gradients": ("in training every trainable parameter gets a gradient", _gives_every_parameter_a_gradient),
    "noise_head": ("where there is no noise, its head costs nothing", _spares_the_noise_head),
    "batch": ("the batch is left as it was", _leaves_the_batch_alone),
    "model": ("a forward pass leaves the model as it was", _leaves_itself_alone),
    "repeatable": ("evaluation gives the same each time", _repeats_itself),
    "labels": ("labels are not read", _reads_no_labels),
    "singles": ("a batch is predicted as its structures alone", _predicts_structures_as_if_alone),
    "zeros": ("'condition_forces' of zeros are as good as none", _takes_zeros_for_none),
    "conditioning": ("'condition_forces' are seen", _sees_its_conditioning),
    "own_structure": (
        "'condition_forces' are seen by their own structure alone",
        _sees_no_other_conditioning,
    ),
}
"""Sentence and check of each contract, by its name, in the order in which they are tried."""
