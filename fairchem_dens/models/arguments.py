"""Refusing arguments of models that are not supported, by their YAML key."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

MAX_DEGREE = 11
"""fairchem tabulates Wigner matrices up to here."""


def argument_names(model: type) -> list[str]:
    """Return the names of a model's arguments, without the one that gathers unknown ones."""
    return [name for name in inspect.signature(model).parameters if name not in ("self", "unknown")]


def require(name: str, value: Any, supported: list[Any]) -> None:
    """Raise a `ValueError` if ``value`` is none of the supported ones."""
    if value not in supported:
        raise ValueError(f"'model.{name}' must be {' or '.join(map(repr, supported))}, found {value!r}.")


def require_range(name: str, value: Any, is_legal: bool, legal: str) -> None:
    """Raise a `ValueError` that says what is ``legal`` unless the value is."""
    if not is_legal:
        raise ValueError(f"'model.{name}' must be {legal}, found {value!r}.")


def check_degrees(lmax_list: Any, mmax_list: Any) -> None:
    """Raise a `ValueError` unless both are lists of one number in the range of fairchem's blocks."""
    for name, degrees in (("lmax_list", lmax_list), ("mmax_list", mmax_list)):
        if not isinstance(degrees, Sequence) or len(degrees) != 1:
            raise ValueError(
                f"'model.{name}' must be a list of one number, found {degrees!r}: "
                "several resolutions do not work."
            )
    (lmax,), (mmax,) = lmax_list, mmax_list
    if not 1 <= lmax <= MAX_DEGREE:
        raise ValueError(f"'model.lmax_list' must be between [1] and [{MAX_DEGREE}], found {lmax_list!r}.")
    if not 0 <= mmax <= lmax:
        raise ValueError(
            f"'model.mmax_list' must be between [0] and 'lmax_list' ({lmax_list!r}), found {mmax_list!r}."
        )


def check_resolution(name: str, resolution: int | None, lmax: int) -> None:
    """Raise a `ValueError` if a grid of so many points along each angle is too coarse for ``lmax``."""
    if resolution is not None and (resolution < 2 * (lmax + 1) or resolution % 2):
        raise ValueError(
            f"'model.{name}' must be an even number of at least {2 * (lmax + 1)} for lmax {lmax}, "
            f"found {resolution!r}; or null for the smallest."
        )
