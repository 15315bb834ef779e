"""The network on the grid, without its grid.

A program holds a node and walks over the grid in pieces: transform, SiLU, linear layer, SiLU, transform
back, add. The backward pass makes the pieces again. What the gradient of the weight needs of each point it
writes down for a portion of the nodes, from where one matrix product adds it up; a program of its own for
each part of that sum would have to hold the weight's gradient next to everything else.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import portions
from fairchem_dens.ops.fused.launching import Prepared, blocks, dot_precision, launch, power_of_two
from fairchem_dens.ops.precision import product_dtype

_POINTS = 32
"""Grid points of a piece; half as many in single precision."""


@triton.jit
def _forward(
    x, weight, out, to_grid, from_grid, ROWS: tl.constexpr, ROWS_OUT: tl.constexpr, H: tl.constexpr,
    POINTS: tl.constexpr, R: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, R)
    channel = tl.arange(0, H)
    where = row[:, None] * H + channel[None, :]
    values = tl.load(x + node * (ROWS * H) + where, mask=(row < ROWS)[:, None], other=0.0)
    linear = tl.load(weight + channel[None, :] * H + channel[:, None])
    total = tl.zeros((R, H), dtype=tl.float32)
    for first in range(0, POINTS, G):
        point = first + tl.arange(0, G)
        there = tl.load(to_grid + point[:, None] * R + row[None, :])
        back = tl.load(from_grid + point[None, :] * R + row[:, None])
        grid = tl.dot(there, values, input_precision=PRECISION)
        grid = (grid * tl.sigmoid(grid)).to(values.dtype)
        grid = tl.dot(grid, linear, input_precision=PRECISION)
        grid = (grid * tl.sigmoid(grid)).to(values.dtype)
        total += tl.dot(back, grid, input_precision=PRECISION)
    tl.store(
        out + node * (ROWS_OUT * H) + where, total.to(out.dtype.element_ty), mask=(row < ROWS_OUT)[:, None]
    )


@triton.jit
def _backward(
    d_out, x, weight, d_x, d_second, activated, to_grid, from_grid, num_points, ROWS: tl.constexpr,
    ROWS_OUT: tl.constexpr, H: tl.constexpr, POINTS: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, R)
    channel = tl.arange(0, H)
    where = row[:, None] * H + channel[None, :]
    values = tl.load(x + node * (ROWS * H) + where, mask=(row < ROWS)[:, None], other=0.0)
    gradients = tl.load(d_out + node * (ROWS_OUT * H) + where, mask=(row < ROWS_OUT)[:, None], other=0.0)
    gradients = gradients.to(values.dtype)
    linear = tl.load(weight + channel[:, None] * H + channel[None, :])
    total = tl.zeros((R, H), dtype=tl.float32)
    for first in range(0, POINTS, G):
        point = first + tl.arange(0, G)
        there = tl.load(to_grid + point[:, None] * R + row[None, :])
        there_transposed = tl.load(to_grid + point[None, :] * R + row[:, None])
        back_transposed = tl.load(from_grid + point[:, None] * R + row[None, :])
        on_grid = node * num_points * H + point[:, None] * H + channel[None, :]
        exists = (point < num_points)[:, None]
        one = tl.dot(there, values, input_precision=PRECISION)
        active = (one * tl.sigmoid(one)).to(values.dtype)
        tl.store(activated + on_grid, active, mask=exists)
        two = tl.dot(active, tl.trans(linear), input_precision=PRECISION)
        sigmoid = tl.sigmoid(two)
        gradient = tl.dot(back_transposed, gradients, input_precision=PRECISION)
        gradient = (gradient * (sigmoid * (1.0 + two * (1.0 - sigmoid)))).to(values.dtype)
        tl.store(d_second + on_grid, gradient, mask=exists)
        d_one = tl.dot(gradient, linear, input_precision=PRECISION)
        sigmoid = tl.sigmoid(one)
        d_one = (d_one * (sigmoid * (1.0 + one * (1.0 - sigmoid)))).to(values.dtype)
        total += tl.dot(there_transposed, d_one, input_precision=PRECISION)
    tl.store(d_x + node * (ROWS * H) + where, total.to(d_x.dtype.element_ty), mask=(row < ROWS)[:, None])


def _padded(table: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Return a table (G, R) with zeros beyond."""
    points, known = table.shape
    made = table.new_zeros(blocks(points, _POINTS) * _POINTS, rows, dtype=dtype)
    made[:points, :known] = table
    return made


_prepared = Prepared(_padded)


class _GridMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        dtype, ctx.precision = product_dtype(x), dot_precision()
        x, cast = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
        size = power_of_two(max(x.shape[1], from_grid.shape[1]), 16)
        there, back = _prepared(to_grid, dtype, size), _prepared(from_grid, dtype, size)
        ctx.save_for_backward(x, weight, there, back)
        ctx.rows_out, ctx.points = from_grid.shape[1], len(to_grid)
        out = x.new_empty(x.shape[0], from_grid.shape[1], x.shape[2])
        launch(
            _forward, (len(x),), x, x, cast, out, there, back, **_sizes(x, ctx.rows_out, there, ctx.precision)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, there, back = ctx.saved_tensors
        grad, cast = grad.contiguous(), weight.to(x.dtype).contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        sizes = _sizes(x, ctx.rows_out, there, ctx.precision)
        with torch.autocast(x.device.type, enabled=False):
            for part in portions(len(x), 2 * ctx.points * x.shape[2] * x.element_size(), x.device):
                some = x[part]
                gradients = some.new_empty(len(some), ctx.points, x.shape[2])
                activated = torch.empty_like(gradients)
                launch(
                    _backward, (len(some),), x, grad[part], some, cast, grad_x[part], gradients, activated,
                    there, back, ctx.points, **sizes,
                )  # fmt: skip
                grad_weight.add_(gradients.flatten(0, 1).T @ activated.flatten(0, 1))
        return grad_x, grad_weight, None, None


def _sizes(x: Tensor, rows_out: int, there: Tensor, precision: str) -> dict[str, Any]:
    _, rows, hidden = x.shape
    return {
        "ROWS": rows, "ROWS_OUT": rows_out, "H": hidden, "POINTS": there.shape[0], "R": there.shape[1],
        "G": _POINTS if x.element_size() == 2 else _POINTS // 2, "PRECISION": precision, "num_warps": 8,
        # Not pipelined: the pieces' tables are small, and what a program holds fills the shared memory.
        "num_stages": 1,
    }  # fmt: skip


def grid_mlp(x: Tensor, weight: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """Apply SiLU, a linear layer and SiLU at each point; with gradients to ``x`` and ``weight``.

    Args:
        x: (N, S, H), H a power of two.
        weight: (H, H).
        to_grid: (G, S), constant.
        from_grid: (G, S'), constant.

    Returns:
        (N, S', H).
    """
    return _GridMLP.apply(x, weight, to_grid, from_grid)
