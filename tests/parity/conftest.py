"""Files of outputs of the authors' code, and our models with the weights in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from golden_batches import with_weights


@pytest.fixture(scope="module")
def file(chosen: Any, golden: Callable[[str], Any]) -> dict[str, Any]:
    """The file that a test module has ``chosen``."""
    return golden(chosen.name)


@pytest.fixture(scope="module")
def model(chosen: Any, file: dict[str, Any]) -> nn.Module:
    """The model that it is for, in evaluation mode."""
    return with_weights(chosen.model, file)
