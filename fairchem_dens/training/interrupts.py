"""Signals that ask a run to stop, delivered only where its weights belong to a step.

Without SLURM, SIGTERM and SIGUSR2 (what schedulers send before they take a machine away) both mean: write a
checkpoint and stop. A handler that somebody else installed, such as submitit's, stays in charge; it is only
held back while the optimizer is changing the weights.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

Handler = Callable[[int, Any], Any]


class Interrupts:
    """Watches `SIGNALS`, and holds them back while `hold` is in force.

    Args:
        stop: what to do on a signal that nobody else handles; called with its number.
    """

    def __init__(self, stop: Callable[[int], None]) -> None:
        self._stop = stop
        self._held = False
        self._waiting: list[tuple[Handler, int, Any]] = []
        self._pid = -1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle signals inside this block. In a thread other than the main one Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pid = os.getpid()
        before = {}
        for number in SIGNALS:
            found = signal.getsignal(number)
            if found is signal.SIG_DFL:
                handler: Handler = self._stop_for
            elif callable(found):
                handler = found
            else:  # ignored, or installed by something that is not Python
                continue
            before[number] = found
            signal.signal(number, partial(self._arrived, handler))
        try:
            yield
        finally:
            for number, found in before.items():
                signal.signal(number, found)

    def hold(self) -> None:
        """From here on a signal waits for `release`."""
        self._held = True

    def release(self) -> None:
        """Deliver all that has been waiting, in the order of arrival, until one ends the run."""
        self._held = False
        while self._waiting:
            handler, number, frame = self._waiting.pop(0)
            handler(number, frame)

    def _arrived(self, handler: Handler, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            # A loader worker inherits the handler, with the trainer as it was when the worker started:
            # a checkpoint of that would replace a newer one. Workers end with the process that they serve.
            return
        if self._held:
            # All of them: submitit ignores SIGTERM and acts on the SIGUSR2 that SLURM sends behind it.
            self._waiting.append((handler, number, frame))
        else:
            handler(number, frame)

    def _stop_for(self, number: int, _frame: Any) -> None:
        self._stop(number)
