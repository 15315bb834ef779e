"""Loggers: one that logs nothing, and one that stands before fairchem's so that logging costs nothing.

fairchem logs each step, by numbers that must come from the device for it, and fails if the logger fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fairchem.core.common.logger import Logger


class NoLogger(Logger):
    """``logger: none``. The printed lines remain."""

    def watch(self, model: Any, log_freq: int = 1000) -> None:
        """Do nothing."""

    def log_plots(self, plots: Any) -> None:
        """Do nothing."""

    def mark_preempting(self) -> None:
        """Do nothing."""

    def log_summary(self, summary_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def log_artifact(self, name: str, type: str, file_location: str) -> None:  # noqa: A002  # fairchem's name
        """Do nothing."""


class PatientLogger:
    """Passes on what is printed, and survives what goes wrong on the way.

    Training numbers are passed on every ``every`` steps, all else at once. An error of the logger is said and
    counted but does not end the run: on several ranks only one has a logger, and the others would wait.

    Args:
        logger: one of fairchem's.
        every: the run's ``print_every``.
    """

    def __init__(self, logger: Any, every: int) -> None:
        self._logger, self._every = logger, every
        self.failures = 0

    def log(self, update_dict: Mapping[str, Any], step: int, split: str = "") -> None:
        """Log some numbers, those of training only where they are printed."""
        if split != "train" or step % self._every == 0:
            self._try(self._logger.log, update_dict, step=step, split=split)

    def flush(self) -> None:
        """Write what the logger still holds, where it can; tensorboard's waits up to two minutes."""
        writer = getattr(self._logger, "writer", None)
        if writer is not None:
            self._try(writer.flush)
        if self.failures:
            logging.warning(f"Logging failed {self.failures} times: curves have gaps.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for before there is a logger, as copying does
            raise AttributeError(name)
        found = getattr(self._logger, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: self._try(found, *args, **kwargs)

    def _try(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                logging.warning(
                    f"Logging failed, the run goes on ({type(error).__name__}: {error}). Further failures "
                    "are counted."
                )
            return None
