"""Signals: delivered at once, held back in an update, left to whoever had them, ignored in children."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from fairchem_dens.training.interrupts import SIGNALS, Interrupts


@pytest.fixture
def stopped() -> list[int]:
    return []


@pytest.fixture
def interrupts(stopped: list[int]) -> Interrupts:
    return Interrupts(stopped.append)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once(interrupts: Interrupts, stopped: list[int], number: int) -> None:
    with interrupts.watched():
        send(number)
        assert stopped == [number]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_in_an_update_waits_for_its_end(interrupts: Interrupts, stopped: list[int]) -> None:
    with interrupts.watched():
        interrupts.hold()
        send(signal.SIGTERM)
        send(signal.SIGUSR2)
        assert stopped == []
        interrupts.release()
        assert sorted(stopped) == sorted([signal.SIGTERM, signal.SIGUSR2])
        interrupts.release()
        assert len(stopped) == 2


def test_a_handler_that_is_there_stays_in_charge_and_waits_too(
    interrupts: Interrupts, stopped: list[int]
) -> None:
    arrived: list[int] = []

    def theirs(number: int, _frame: Any) -> None:
        arrived.append(number)

    before = signal.signal(signal.SIGUSR2, theirs)
    try:
        with interrupts.watched():
            send(signal.SIGUSR2)
            assert arrived == [signal.SIGUSR2]
            interrupts.hold()
            send(signal.SIGUSR2)
            assert len(arrived) == 1
            interrupts.release()
            assert len(arrived) == 2
        assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert stopped == []


def test_an_ignored_signal_stays_ignored(interrupts: Interrupts, stopped: list[int]) -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with interrupts.watched():
            send(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert stopped == []


def test_a_forked_worker_does_nothing(interrupts: Interrupts, stopped: list[int]) -> None:
    """A scheduler signals all processes of a job; a worker holds the trainer as it once was."""
    with interrupts.watched():
        child = os.fork()
        if child == 0:
            send(signal.SIGUSR2)
            os._exit(len(stopped))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
