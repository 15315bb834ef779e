"""What `fairchem-dens data from-ase` can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ase.data import atomic_numbers

RULES = ("system", "file", "formula", "key:NAME", "regex:PATTERN")
ENERGIES = ("total", "relative", "referenced")
REFERENCE_FRAMES = ("last", "first", "lowest")
TAGS = ("auto", "file", "rule", "none")
FIXED = ("file", "none")
SYSTEM_KEYS = ("sid", "system")
"""What names the system of a frame in its ``info``, or in the key-value pairs or data of its row."""


@dataclass(frozen=True)
class ReadSettings:
    """What a process that reads files needs to know. Its content names what it leaves on disk.

    Attributes:
        format: of all files, as ASE calls it; None tells it from each file.
        tags, fixed, adsorbate_elements, energy_key, forces_key, max_force, max_atoms, min_distance: as in
            `Settings`.
        system_keys: fields that name the system of a frame; the first that is there counts.
        system_required: whether a frame without them is an error.
    """

    format: str | None
    tags: str
    fixed: str
    adsorbate_elements: tuple[str, ...]
    energy_key: str
    forces_key: str
    max_force: float | None
    max_atoms: int | None
    min_distance: float | None
    system_keys: tuple[str, ...]
    system_required: bool


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is written.

    Attributes:
        format: ASE's name of the format of all files; None tells it from each file.
        split_by: what is kept together in a split, one of `RULES`.
        val: share (float) or number (int) of the systems in val.
        test: the same for test.
        seed: of the split.
        energy: ``total``, ``relative`` or ``referenced``.
        relative_to: which frame of a system is the zero of relative energies and of ``max_energy_above``.
        tags: where tags come from.
        fixed: where fixed atoms come from.
        adsorbate_elements: elements that the rule for tags takes for adsorbates where they are free.
        energy_key: name of the energy in results, ``info`` or data of a frame.
        forces_key: name of the forces there or in the arrays.
        max_force: eV/Å, of any atom of a frame.
        max_energy_above: eV above the system's reference frame.
        max_atoms: of a frame.
        min_distance: Å, between any two atoms.
        skip_first: leave out so many frames of each system.
        every: of the others, take each so-manieth.
        max_frames: of each system, spread evenly over what the filters left.
        frames_per_file: frames in one LMDB file; None writes one file for each split.
        skip_unreadable: leave out files that cannot be read.

    Raises:
        ValueError: a setting is impossible; names its option.
    """

    format: str | None = None
    split_by: str = "system"
    val: float | int = 0.1
    test: float | int = 0.0
    seed: int = 0
    energy: str = "total"
    relative_to: str = "last"
    tags: str = "auto"
    fixed: str = "file"
    adsorbate_elements: tuple[str, ...] = ("H", "C", "N", "O")
    energy_key: str = "energy"
    forces_key: str = "forces"
    max_force: float | None = None
    max_energy_above: float | None = None
    max_atoms: int | None = None
    min_distance: float | None = None
    skip_first: int = 0
    every: int = 1
    max_frames: int | None = None
    frames_per_file: int | None = None
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("energy", ENERGIES),
            ("relative_to", REFERENCE_FRAMES),
            ("tags", TAGS),
            ("fixed", FIXED),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"'{option(name)}' must be one of {', '.join(choices)}, found '{getattr(self, name)}'."
                )
        _check_rule(self.split_by)
        for name in ("val", "test"):
            size = getattr(self, name)
            if size < 0 or (isinstance(size, float) and size >= 1):
                raise ValueError(
                    f"'{option(name)}' must be a share from 0 to below 1, such as 0.1, or a whole number of "
                    f"systems, found {size}."
                )
        for name in ("max_force", "max_energy_above", "min_distance"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"'{option(name)}' must be above 0, found {value:g}.")
        for name, least in (
            ("max_atoms", 1),
            ("max_frames", 1),
            ("frames_per_file", 1),
            ("every", 1),
            ("skip_first", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"'{option(name)}' must be at least {least}, found {value}.")
        unknown = [symbol for symbol in self.adsorbate_elements if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(
                f"'{option('adsorbate_elements')}' names '{unknown[0]}', which is no element's symbol. Give "
                "symbols with commas between them, such as H,C,N,O."
            )

    @property
    def read(self) -> ReadSettings:
        """The part of the settings that reading depends on."""
        key = self.split_by.partition(":")[2] if self.split_by.startswith("key:") else None
        return ReadSettings(
            format=self.format,
            tags=self.tags,
            fixed=self.fixed,
            adsorbate_elements=self.adsorbate_elements,
            energy_key=self.energy_key,
            forces_key=self.forces_key,
            max_force=self.max_force,
            max_atoms=self.max_atoms,
            min_distance=self.min_distance,
            system_keys=(key,) if key else SYSTEM_KEYS,
            system_required=key is not None,
        )


def option(name: str) -> str:
    """Return how a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _check_rule(rule: str) -> None:
    kind, _, argument = rule.partition(":")
    if rule in ("system", "file", "formula") or (kind == "key" and argument):
        return
    if kind == "regex" and argument:
        try:
            re.compile(argument)
        except re.error as error:
            raise ValueError(f"'--split-by {rule}' is not a regular expression: {error}.") from error
        return
    raise ValueError(f"'--split-by' must be one of {', '.join(RULES)}, found '{rule}'.")
