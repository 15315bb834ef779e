"""Corrupting structures: which atoms are displaced, how far, and which forces the model may see for it.

The noise of a structure is a pure function of (seed, epoch, structure), the structure being known by its
content. It is therefore the same for any number of loader workers and ranks, different in each epoch, and a
resumed run sees what an uninterrupted one would have. This module knows neither trainers nor models.

Source: arXiv 2403.09549, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch

from fairchem_dens import keys
from fairchem_dens.randomness import generator, passing_generator
from fairchem_dens.shallow import with_fields
from fairchem_dens.validation import refuse_unknown_keys, require_mapping, require_number

Switch = Literal["structure", "batch"]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Settings of the corruption, checked when they are made.

    Attributes:
        prob: probability that a structure (``switch: structure``) or a whole batch (``switch: batch``) is
            corrupted.
        std: standard deviation σ of the noise on each coordinate, Å. Excludes the three multi-scale settings.
        std_low, std_high, num_steps: multi-scale noise. One σ per structure, from ``num_steps`` values spaced
            evenly in ln σ.
        corrupt_ratio: probability that an atom of a corrupted structure is displaced. None displaces all.
        all_atoms: fixed atoms are displaced too.
        switch: what one coin of probability ``prob`` decides about.
        strict_max_ratio: leave a structure alone if more than this share of its atoms was chosen.
        max_force_norm: leave a structure alone if the force on one of its atoms is larger, in the units of
            the data.
        where: YAML path of these settings, for error messages.

    Raises:
        ValueError: a value is impossible, or two settings contradict each other; names the setting.
    """

    prob: float
    std: float | None = None
    std_low: float | None = None
    std_high: float | None = None
    num_steps: int | None = None
    corrupt_ratio: float | None = None
    all_atoms: bool = False
    switch: Switch = "structure"
    strict_max_ratio: float | None = None
    max_force_norm: float | None = None
    where: str = "dens"

    def __post_init__(self) -> None:
        self._check("prob", minimum=0.0, maximum=1.0, open_below=False)
        multi_scale = {name: getattr(self, name) for name in ("std_low", "std_high", "num_steps")}
        given = [name for name, value in multi_scale.items() if value is not None]
        if self.std is not None:
            self._check("std")
            if given:
                raise ValueError(
                    f"'{self.where}.std' is one fixed noise level and '{self.where}.{given[0]}' belongs to "
                    "multi-scale noise: "
                    "give either 'std' or all of 'std_low', 'std_high' and 'num_steps'."
                )
        elif len(given) < len(multi_scale):
            missing = [name for name in multi_scale if name not in given]
            raise ValueError(
                f"'{self.where}' needs a noise level: give 'std' (Å), or 'std_low', 'std_high' and "
                "'num_steps' "
                f"(missing: {', '.join(missing)})."
            )
        else:
            self._check("std_low")
            self._check("std_high")
            if self.std_low > self.std_high:  # type: ignore[operator]  # checked: both are numbers
                raise ValueError(
                    f"'{self.where}.std_low' ({self.std_low}) is larger than '{self.where}.std_high' "
                    f"({self.std_high})."
                )
            if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
                raise ValueError(
                    f"'{self.where}.num_steps' must be a whole number from 1, found {self.num_steps!r}."
                )
        for name in ("corrupt_ratio", "strict_max_ratio"):
            if getattr(self, name) is not None:
                self._check(name, maximum=1.0)
        if self.max_force_norm is not None:
            self._check("max_force_norm")
        if not isinstance(self.all_atoms, bool):
            raise ValueError(f"'{self.where}.all_atoms' must be True or False, found {self.all_atoms!r}.")
        if self.switch not in get_args(Switch):
            raise ValueError(
                f"'{self.where}.switch' must be 'structure' (a coin for each structure) or 'batch' (one coin "
                "for a batch), "
                f"found {self.switch!r}."
            )

    def _check(
        self, name: str, minimum: float = 0.0, maximum: float = math.inf, open_below: bool = True
    ) -> None:
        value = require_number(getattr(self, name), f"{self.where}.{name}")
        if (
            not math.isfinite(value)
            or value > maximum
            or value < minimum
            or (open_below and value == minimum)
        ):
            lower = f"above {minimum:g}" if open_below else f"from {minimum:g}"
            upper = f" and at most {maximum:g}" if math.isfinite(maximum) else ""
            raise ValueError(f"'{self.where}.{name}' must be {lower}{upper}, found {value:g}.")

    @classmethod
    def from_config(cls, settings: Mapping[str, Any] | None, where: str = "dens") -> Corruption:
        """Build from the YAML mapping of the transform ``dens``.

        Args:
            settings: the mapping.
            where: its YAML path, for error messages.

        Raises:
            ValueError: an unknown key (with the nearest known one), or what the class itself refuses.
        """
        settings = require_mapping(settings, where)
        refuse_unknown_keys(settings, [field.name for field in fields(cls) if field.name != "where"], where)
        if "prob" not in settings:
            raise ValueError(
                f"'{where}.prob' is missing: the probability that a structure is corrupted, 0.5 on OC20 and "
                "OC22."
            )
        return cls(**settings, where=where)

    @property
    def noise_scale(self) -> float:
        """The σ, in Å, that the loss divides the noise by: ``std``, or ``std_high`` of multi-scale noise."""
        scale = self.std if self.std is not None else self.std_high
        assert scale is not None  # the constructor refuses settings with neither
        return float(scale)

    def levels(self) -> np.ndarray:
        """Return all values of σ, in Å, ascending."""
        if self.std is not None:
            return np.array([self.std])
        low, high = math.log(self.std_low), math.log(self.std_high)  # type: ignore[arg-type]  # checked
        return np.exp(np.linspace(low, high, self.num_steps))  # type: ignore[arg-type]  # checked


def batch_is_corrupted(corruption: Corruption, *, seed: int, step: int) -> bool:
    """Toss the coin of ``switch: batch``, the same on all ranks.

    Args:
        corruption: the settings.
        seed: seed of the run.
        step: optimizer step, from 1.
    """
    return bool(generator(seed, step).random() < corruption.prob)


def corrupt(data: Any, corruption: Corruption, *, seed: int, epoch: int, selected: bool | None = None) -> Any:
    """Return a shallow copy of a structure or batch, corrupted, with the five DeNS fields of `keys`.

    ``data`` itself is left as it is, and so are all its tensors. The copy also has ``md``, (B,) bool.

    Args:
        data: a torch_geometric ``Data`` or ``Batch`` with ``pos``, ``atomic_numbers``, ``fixed`` and
            ``forces`` (or ``force``); ``cell`` and ``md`` are used where present.
        corruption: the settings.
        seed: seed of the run.
        epoch: epoch, from 0.
        selected: whether the structures are to be corrupted; None lets each one's own coin decide.

    Raises:
        ValueError: a field is missing, a structure is empty or a force is not finite; names the structure and
            what to do.
    """
    fields = data.to_dict()
    pos = fields[keys.POS]
    sizes = _sizes(fields)
    forces = _forces(fields)
    if fields.get(keys.FIXED) is None:
        raise ValueError(
            f"{_name(fields, None)} has no field '{keys.FIXED}' that says which atoms are held fixed, so it "
            "is not known which may be "
            "displaced. Write it with the data (zeros if all atoms are free, as in molecules)."
        )
    host_pos, host_forces = _on_host(pos), _on_host(forces)
    movable = None if corruption.all_atoms else _on_host(fields[keys.FIXED]) == 0
    numbers, cells = _on_host(fields[keys.ATOMIC_NUMBERS].long()), None
    if fields.get(keys.CELL) is not None:
        cells = _on_host(fields[keys.CELL]).reshape(-1, 3, 3)
    is_md = _md_flags(fields, len(sizes))
    levels = corruption.levels()

    mask = np.zeros(len(host_pos), dtype=bool)
    noise = np.zeros_like(host_pos)
    sigmas = np.zeros((len(host_pos), 1), dtype=host_pos.dtype)
    corrupted = np.zeros(len(sizes), dtype=bool)
    # A sum is finite only if all its terms are.
    finite = math.isfinite(host_forces.sum())
    start = 0
    for index, size in enumerate(sizes):
        atoms = slice(start, start + size)
        start += size
        if size == 0:
            raise ValueError(f"{_name(fields, index)} has no atoms: remove it from the data set.")
        if not finite and not np.isfinite(host_forces[atoms]).all():
            raise ValueError(
                f"{_name(fields, index)} has forces that are not finite; DeNS feeds forces to the model. "
                "Remove the structure from the data set."
            )
        if selected is False or is_md[index]:
            continue
        # What a structure is known by; the same bytes whether it stands alone or in a batch.
        content = [numbers[atoms].tobytes(), host_pos[atoms].tobytes()]
        if cells is not None:
            content.append(cells[index].tobytes())
        rng = passing_generator(seed, epoch, content=content)
        # What is drawn, and its order, depends on no setting but the coin: a setting that changes one
        # decision leaves the others as they were.
        coin = rng.random() < corruption.prob
        if not (coin if selected is None else selected):
            continue
        level = levels[rng.integers(len(levels))]
        chosen = rng.random(size) < (1.0 if corruption.corrupt_ratio is None else corruption.corrupt_ratio)
        unit_noise = rng.standard_normal((size, 3))
        if _is_left_alone(corruption, chosen, host_forces[atoms]):
            continue
        if movable is not None:
            chosen &= movable[atoms]
        if not chosen.any():
            continue
        corrupted[index] = True
        mask[atoms] = chosen
        unit_noise[~chosen] = 0.0
        noise[atoms] = level * unit_noise
        sigmas[atoms] = level

    new_pos = host_pos.copy()
    condition_forces = np.zeros_like(host_forces)
    if corrupted.any():
        # Nothing is added to the others: that would turn -0.0 into 0.0, and they must stay bit for bit.
        np.add(host_pos, noise, out=new_pos, where=mask[:, None])
        np.copyto(condition_forces, host_forces, where=mask[:, None])
    changed = {
        keys.POS: new_pos,
        keys.NOISE_VEC: noise,
        keys.NOISE_MASK: mask,
        keys.CONDITION_FORCES: condition_forces,
        keys.SIGMAS: sigmas,
        keys.CORRUPTED: corrupted,
        # On every structure, or collating would drop the field where the first of a batch has none.
        keys.MD: np.array(is_md),
    }
    tensors = {key: torch.from_numpy(value) for key, value in changed.items()}
    if pos.device.type != "cpu":
        tensors = {key: tensor.to(pos.device) for key, tensor in tensors.items()}
    return with_fields(data, tensors)


def _on_host(values: torch.Tensor) -> np.ndarray:
    return values.numpy(force=True)  # whatever its device


def _is_left_alone(corruption: Corruption, chosen: np.ndarray, forces: np.ndarray) -> bool:
    """The two restrictions of DeNS's successor, both off by default."""
    if corruption.strict_max_ratio is not None and chosen.mean() > corruption.strict_max_ratio:
        return True
    return corruption.max_force_norm is not None and bool(
        (np.linalg.norm(forces, axis=-1) > corruption.max_force_norm).any()
    )


def _sizes(fields: Mapping[str, Any]) -> list[int]:
    if fields.get(keys.BATCH) is not None:
        return torch.as_tensor(fields[keys.NATOMS]).reshape(-1).tolist()
    return [fields[keys.POS].shape[0]]


def _forces(fields: Mapping[str, Any]) -> torch.Tensor:
    for name in reversed(keys.FORCES_ALIASES):
        # Both names are there only if a mapping copied one; then they hold the same tensor.
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(
        f"{_name(fields, None)} has no field '{keys.FORCES}' (nor '{keys.FORCES_ALIASES[1]}'). DeNS needs "
        "forces: they are the model's input for corrupted "
        "structures. Train on data with forces, or remove 'dens' from 'dataset.train.transforms'."
    )


def _md_flags(fields: Mapping[str, Any], count: int) -> list[bool]:
    if fields.get(keys.MD) is None:
        return [False] * count
    flags = [bool(flag) for flag in np.asarray(fields[keys.MD]).reshape(-1)]
    return flags * count if len(flags) == 1 else flags


def _name(fields: Mapping[str, Any], index: int | None) -> str:
    """Name a structure by its ids, as far as it has any."""
    said = []
    for key in (keys.SID, keys.FID, "id"):
        if key not in fields:
            continue
        value = fields[key]
        value = value.reshape(-1).tolist() if isinstance(value, torch.Tensor) else value
        if isinstance(value, list | tuple):
            value = value[index or 0] if value else None
        said.append(f"{key} {value}")
    return f"Structure ({', '.join(said)})" if said else "A structure without sid or fid"
