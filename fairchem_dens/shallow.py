"""Shallow copies of torch_geometric's objects, without what its general assignment costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def with_fields(data: Any, fields: Mapping[str, Any]) -> Any:
    """Return a shallow copy of a ``Data`` or ``Batch`` in which these fields are set, none of them None."""
    result = copy.copy(data)
    result._store._mapping.update(fields)  # an assignment looks for properties first, ten times as long
    return result
