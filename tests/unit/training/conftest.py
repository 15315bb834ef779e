"""Runs whose model takes no time: what is tested here is around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Trainer = Callable[..., Any]


@pytest.fixture
def settings(run_settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `run_settings`, with a toy model and no logger."""
    run_settings["logger"] = "none"
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    return run_settings
