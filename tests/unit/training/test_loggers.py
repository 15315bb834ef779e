"""Loggers: the one that logs nothing, and the one that stands before fairchem's."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from fairchem.core.common.logger import Logger
from fairchem.core.common.registry import registry

import fairchem_dens.register  # noqa: F401  # brings the logger
from fairchem_dens.training.loggers import NoLogger, PatientLogger


class Remembering(Logger):
    """A logger as somebody may register one."""

    def __init__(self) -> None:
        super().__init__({})
        self.seen: list[Any] = []
        self.error: Exception | None = None

    def log(self, update_dict: Any, step: int, split: str = "") -> None:
        if self.error is not None:
            raise self.error
        self.seen.append((step, split, dict(update_dict)))

    def watch(self, model: Any, log_freq: int = 1000) -> None:
        self.seen.append(("watch", model, log_freq))

    def mark_preempting(self) -> None:
        self.seen.append("preempting")

    def log_plots(self, plots: Any) -> None: ...

    def log_summary(self, summary_dict: dict[str, Any]) -> None:
        self.seen.append(summary_dict)

    def log_artifact(self, name: str, type: str, file_location: str) -> None: ...  # noqa: A002


def test_none_is_a_logger_of_fairchems() -> None:
    assert registry.get_logger_class("none") is NoLogger
    logger = NoLogger({})
    logger.log({"loss": 1.0}, step=1, split="train")
    logger.log_summary({})
    logger.mark_preempting()
    logger.watch(None)
    logger.log_plots([])
    logger.log_artifact("a", "b", "c")


def test_training_is_logged_where_it_is_printed_and_all_else_at_once() -> None:
    inner = Remembering()
    logger = PatientLogger(inner, every=3)
    for step in range(1, 8):
        logger.log({"loss": step}, step=step, split="train")
    logger.log({"loss": 0.5}, step=7, split="val")
    logger.mark_preempting()
    logger.watch("model", log_freq=7)
    assert inner.seen == [
        (3, "train", {"loss": 3}),
        (6, "train", {"loss": 6}),
        (7, "val", {"loss": 0.5}),
        "preempting",
        ("watch", "model", 7),
    ]
    assert logger.seen is inner.seen
    assert copy.copy(logger).seen is inner.seen
    with pytest.raises(AttributeError):
        logger.nothing_of_that_name()


def test_a_logger_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    inner = Remembering()
    logger = PatientLogger(inner, every=1)
    inner.error = OSError("no connection")
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            logger.log({"loss": 1.0}, step=step, split="train")
        inner.error = None
        logger.log({"loss": 1.0}, step=4, split="train")
        logger.flush()
    assert inner.seen == [(4, "train", {"loss": 1.0})]
    assert len(caplog.messages) == 2
    assert "the run goes on (OSError: no connection)" in caplog.messages[0]
    assert "3 times" in caplog.messages[1]


def test_a_user_who_interrupts_is_heard() -> None:
    inner = Remembering()
    inner.error = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        PatientLogger(inner, every=1).log({}, step=1)
