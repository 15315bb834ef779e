"""fairchem's moving average of the weights, updated in a few kernels instead of two for each parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from torch import nn


class ForeachAverage(ExponentialMovingAverage):
    """In place of fairchem's class: the same decay, ``num_updates`` and state dict, on CPU the same bits.

    An update moves the average a by (1 - d) (w - a) towards the weights w, with d = min(decay,
    (1 + n) / (10 + n)) if updates are counted, n being their number. A step that was skipped has left the
    weights as they were, and counts like any other, as it does in fairchem under a gradient scaler.
    """

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Move the average towards the weights; see fairchem's class."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = list(self._get_parameters(parameters))
        if weights:
            torch._foreach_lerp_(self.shadow_params, weights, 1.0 - decay)
