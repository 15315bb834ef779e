"""Tells from inside a run what it is doing, and kills it at a chosen call of a chosen phase.

The phases are ``step`` (from the forward pass to the end of the weight update), ``save`` (writing a
checkpoint), ``validation`` (evaluating on val, and predicting for the best checkpoint), ``loop`` (the rest of
training, such as waiting for a batch) and ``start`` (all before training). A save within a validation is a
save. Nothing of a run is changed: hooks wrap methods, and count calls or write a line.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from fairchem_dens.trainer import DeNSTrainer

_OF_METHOD = {"train": "loop", "save": "save", "validate": "validation", "predict": "validation"}


class Probe:
    """Follows the phases of this process.

    Args:
        events: file descriptor that each change of phase is written to, as ``phase step``.
        strike: where to die: ``phase``, which ``occurrence`` of it in this process, from 1, and at which
            ``call`` of a function during it, from 1, as Python's profiler counts them. None to live.
        count: write ``calls phase occurrence number`` at the end of each occurrence.
    """

    def __init__(self, events: int, strike: dict[str, Any] | None = None, count: bool = False) -> None:
        self.events, self.strike, self.count = events, strike, count
        self.phases = ["start"]
        self.occurrences: dict[str, int] = {}
        self.calls = 0
        self.completed = 0
        self._pid = os.getpid()

    def say(self, *words: Any) -> None:
        """Write an event; short enough that it arrives whole."""
        os.write(self.events, (" ".join(map(str, words)) + "\n").encode())

    def begin(self, phase: str, trainer: Any) -> None:
        """Enter a phase."""
        self.phases.append(phase)
        occurrence = self.occurrences[phase] = self.occurrences.get(phase, 0) + 1
        self.say("phase", phase, trainer.step, self.completed)
        aimed = self.strike is not None and (self.strike["phase"], self.strike["occurrence"]) == (
            phase,
            occurrence,
        )
        if aimed or self.count:
            self.calls = 0
            sys.setprofile(self._die_at(self.strike["call"]) if aimed else self._count)  # type: ignore[index]

    def end(self, trainer: Any) -> None:
        """Return to the phase that the present one interrupted."""
        sys.setprofile(None)
        phase = self.phases.pop()
        if self.count:
            self.say("calls", phase, self.occurrences[phase], self.calls)
        self.say("phase", self.phases[-1], trainer.step, self.completed)

    def _count(self, _frame: Any, event: str, _argument: Any) -> None:
        if os.getpid() != self._pid:
            sys.setprofile(None)  # a loader worker, forked in the middle of a phase
            return
        self.calls += event in ("call", "c_call")

    def _die_at(self, call: int) -> Callable[..., None]:
        def watch(frame: Any, event: str, argument: Any) -> None:
            self._count(frame, event, argument)
            if self.calls >= call and os.getpid() == self._pid:
                os.kill(os.getpid(), signal.SIGKILL)

        return watch


def install(events: int, **arguments: Any) -> Probe:
    """Watch every trainer of this process; see `Probe`."""
    probe = Probe(events, **arguments)
    for method, phase in _OF_METHOD.items():
        setattr(DeNSTrainer, method, _during(phase, getattr(DeNSTrainer, method), probe))
    forward, backward = DeNSTrainer._forward, DeNSTrainer._backward

    @functools.wraps(forward)
    def _forward(self: Any, batch: Any) -> Any:
        if self.model.training and probe.phases[-1] != "step":
            probe.begin("step", self)
        return forward(self, batch)

    @functools.wraps(backward)
    def _backward(self: Any, loss: Any) -> None:
        backward(self, loss)
        probe.completed = self.step
        probe.end(self)

    DeNSTrainer._forward, DeNSTrainer._backward = _forward, _backward  # type: ignore[method-assign]
    probe.say("phase", "start", 0, 0)
    return probe


def _during(phase: str, method: Callable[..., Any], probe: Probe) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        probe.begin(phase, self)
        try:
            return method(self, *args, **kwargs)
        finally:
            probe.end(self)

    return wrapped
