"""The progress bar of everything that takes long."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(items: Any = None, *, shown: bool = True, **settings: Any) -> tqdm[Any]:
    """Return a bar on standard error: fluent on a terminal, a line now and then in a log file.

    Args:
        items: what to iterate over; None for a bar that is moved by hand.
        shown: whether there is a bar at all.
        settings: of tqdm, such as ``total``, ``desc`` and ``unit``.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, disable=not shown, mininterval=interval, **settings)
