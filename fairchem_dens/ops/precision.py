"""The precision of matrix products under torch's autocast, for functions that bring their own gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type for matrix products with ``x``: autocast's where it is on, else its own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def at_least_single(x: Tensor) -> Tensor:
    """Return a half-precision tensor in single precision, and any other as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
