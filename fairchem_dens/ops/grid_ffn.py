"""The feed-forward network on the sphere: a small network at each point of a grid.

Its first and last linear layers act on channels and have no bias, so they commute with the transforms to
and from the grid. Folded into the linear layers of each degree before and after, they act on (L+1)²
coefficients instead of on G points; one of three matrix products on the grid is left.

Source: arXiv 2306.12059, section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import portions
from fairchem_dens.ops.precision import product_dtype
from fairchem_dens.ops.s2_activation import silu_backward


def degree_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, first: int = 0) -> Tensor:
    """Apply a linear layer of its own to each degree.

    Args:
        x: (N, rows of degrees ``first`` and up, I).
        weight: (number of degrees, O, I).
        bias: (O,), on l = 0.
        first: the lowest degree in ``x``.

    Returns:
        (N, same rows, O).
    """
    sizes = [2 * degree + 1 for degree in range(first, first + len(weight))]
    parts = [F.linear(part, one) for part, one in zip(x.split(sizes, dim=1), weight.unbind(), strict=True)]
    if bias is not None:
        parts[0] = parts[0] + bias.to(parts[0].dtype)
    return torch.cat(parts, dim=1)


def grid_mlp(x: Tensor, weight: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """Apply SiLU, a linear layer and SiLU at each point; with gradients to ``x`` and ``weight``.

    The grid is there for a portion at a time and is made again for the gradient.

    Args:
        x: (N, S, H).
        weight: (H, H).
        to_grid: (G, S), constant.
        from_grid: (G, S'), constant.

    Returns:
        (N, S', H).
    """
    return _GridMLP.apply(x, weight, to_grid, from_grid)


class _GridMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, to_grid, from_grid)
        ctx.dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            to_grid, back, weight = (one.to(ctx.dtype) for one in (to_grid, from_grid.T, weight))
            out = x.new_empty(len(x), from_grid.shape[1], x.shape[2], dtype=ctx.dtype)
            for part in portions(len(x), _bytes(x, to_grid), x.device):
                hidden = F.silu(torch.matmul(to_grid, x[part].to(ctx.dtype)), inplace=True)
                hidden = F.silu(F.linear(hidden, weight), inplace=True)
                out[part] = torch.matmul(back, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, full_weight, to_grid, from_grid = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            to_grid, back, weight = (one.to(ctx.dtype) for one in (to_grid, from_grid, full_weight))
            transposed = to_grid.T.contiguous()
            grad_x = torch.empty_like(x, dtype=ctx.dtype, memory_format=torch.contiguous_format)
            grad_weight = torch.zeros_like(full_weight)
            for part in portions(len(x), 2 * _bytes(x, to_grid), x.device):
                first = torch.matmul(to_grid, x[part].to(ctx.dtype))
                activated = F.silu(first)
                second = F.linear(activated, weight)
                grad_second = silu_backward(torch.matmul(back, grad[part].to(ctx.dtype)), second)
                product = grad_second.flatten(0, 1).T @ activated.flatten(0, 1)
                grad_weight.add_(product)
                grad_first = silu_backward(torch.matmul(grad_second, weight), first)
                grad_x[part] = torch.matmul(transposed, grad_first)
        return grad_x, grad_weight, None, None


def _bytes(x: Tensor, to_grid: Tensor) -> int:
    return x.element_size() * x.shape[2] * 2 * len(to_grid)
