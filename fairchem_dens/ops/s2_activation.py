"""SiLU on the sphere.

Features are evaluated on a grid of points, go through SiLU there, and are projected back. In the
separable form of arXiv 2306.12059, section 4.3, scalars come from a gate of their own instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import portions
from fairchem_dens.ops.precision import product_dtype


def s2_activation(x: Tensor, gate: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """Apply SiLU on a grid; with gradients to ``x`` and ``gate``.

    The grid of G points, more than ten times the size of ``x``, is there for a portion at a time and is made
    again for the gradient.

    Args:
        x: (E, R, H).
        gate: (E, H), whose SiLU takes the place of the first row; None takes the grid's.
        to_grid: (G, R), constant.
        from_grid: (G, R'), constant; R' may be less than R where not all rows are wanted.

    Returns:
        (E, R', H).
    """
    return _S2Activation.apply(x, gate, to_grid, from_grid)


class _S2Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        ctx.has_gate, ctx.dtype = gate is not None, product_dtype(x)
        ctx.save_for_backward(x, to_grid, from_grid, *([gate] if gate is not None else []))
        with torch.autocast(x.device.type, enabled=False):
            skipped = int(ctx.has_gate)
            to_grid, back = to_grid.to(ctx.dtype), from_grid[:, skipped:].to(ctx.dtype).T.contiguous()
            out = x.new_empty(len(x), from_grid.shape[1], x.shape[2], dtype=ctx.dtype)
            for part in portions(len(x), _bytes(x, to_grid), x.device):
                on_grid = F.silu(torch.matmul(to_grid, x[part].to(ctx.dtype)), inplace=True)
                out[part, skipped:] = torch.matmul(back, on_grid)
            if gate is not None:
                out[:, 0] = F.silu(gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, to_grid, from_grid, *gates = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            skipped = int(ctx.has_gate)
            to_grid, back = to_grid.to(ctx.dtype), from_grid[:, skipped:].to(ctx.dtype).contiguous()
            transposed = to_grid.T.contiguous()
            grad_x = torch.empty_like(x, dtype=ctx.dtype, memory_format=torch.contiguous_format)
            for part in portions(len(x), 2 * _bytes(x, to_grid), x.device):
                on_grid = torch.matmul(to_grid, x[part].to(ctx.dtype))
                grad_grid = torch.matmul(back, grad[part, skipped:].to(ctx.dtype))
                grad_x[part] = torch.matmul(transposed, silu_backward(grad_grid, on_grid))
            grad_gate = silu_backward(grad[:, 0].to(gates[0].dtype), gates[0]) if gates else None
        return grad_x, grad_gate, None, None


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Pull a gradient back through SiLU."""
    return torch.ops.aten.silu_backward(grad, x)  # type: ignore[attr-defined]  # torch 2.4 does not list it


def _bytes(x: Tensor, to_grid: Tensor) -> int:
    return x.element_size() * x.shape[2] * 2 * len(to_grid)
