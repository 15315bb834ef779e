"""Reduced precision: what fairchem's ``amp`` means, and bfloat16 beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.training.settings import StepSettings


def needs_no_scaler(amp: bool, settings: StepSettings) -> bool:
    """Whether ``amp`` is on and computes in bfloat16, which has the range of float32."""
    return bool(amp) and settings.dtype is torch.bfloat16


def autocast(amp: bool, settings: StepSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for the model; fairchem opens the one for float16 itself."""
    if needs_no_scaler(amp, settings):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def single(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs with those in half precision as float32: losses and metrics are sums of many."""
    return {
        name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        for name, value in outputs.items()
    }


def without_effect(amp: bool, settings: StepSettings, device: torch.device) -> str | None:
    """Return a sentence if ``amp`` is on and does nothing."""
    if amp and settings.dtype is torch.float16 and device.type == "cpu":
        return (
            "'amp' computes in float16, which fairchem does on a GPU only: this run is in float32. On the "
            "CPU set 'optim.amp_dtype: bfloat16'."
        )
    return None
