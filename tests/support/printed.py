"""What a trainer shows of its steps; it keeps nothing of it."""

from __future__ import annotations

from typing import Any


def metrics_printed_by(trainer: Any) -> set[str]:
    """Return a set that fills with the names of the metrics which ``trainer`` prints."""
    names: set[str] = set()
    printed = trainer._printed

    def watched(means: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        shown = printed(means)
        names.update(shown)
        return shown

    trainer._printed = watched
    return names
