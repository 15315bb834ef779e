"""Parameters that a model holds but does not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_zero_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ``x``, and give the parameters a gradient of zero whenever ``x`` gets one.

    Weight decay acts on parameters with a gradient only, and distributed training waits for each of them.
    """
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    return _WithZeroGradients.apply(x, *learned) if learned else x


class _WithZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return grad, *zeros
