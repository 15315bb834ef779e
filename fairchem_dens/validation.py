"""Refusing settings that nobody will read: unknown keys, with the nearest known one named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def refuse_unknown_keys(settings: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise if ``settings`` holds a key that is not in ``known``.

    Args:
        settings: what the user wrote.
        known: the keys that exist.
        where: the YAML path of ``settings``, for the message.

    Raises:
        ValueError: names the unknown key, its place and the nearest known key.
    """
    known = list(known)
    unknown = [str(key) for key in settings if key not in known]
    if unknown:
        said = ", ".join(f"'{where}.{key}'{nearest(key, known)}" for key in unknown)
        raise ValueError(f"Unknown setting {said}. Known under '{where}': {', '.join(sorted(known))}.")


def require_mapping(settings: Any, where: str) -> Mapping[str, Any]:
    """Return ``settings`` if it is a mapping (an absent value counts as empty).

    Raises:
        ValueError: it is something else.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"'{where}' must be a mapping of settings, found {settings!r}.")
    return settings


def require_number(value: Any, where: str) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: it is not a number. YAML 1.1 reads ``1e-1`` as text, which the message says.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = " YAML reads '1e-1' as text: write 1.0e-1." if isinstance(value, str) else ""
        raise ValueError(f"'{where}' must be a number, found {value!r}.{hint}")
    return float(value)
