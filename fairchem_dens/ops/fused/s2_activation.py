"""The separable S2 activation, without its grid.

A program holds the coefficients of some columns, a column being a channel of an edge, and walks over the
grid in pieces: transform, SiLU, transform back, add. What would be the model's largest tensor, 324 values
for each column, stays on the chip. The backward pass walks once more instead of having saved anything but
its inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.fused.launching import Prepared, blocks, dot_precision, launch, power_of_two
from fairchem_dens.ops.precision import product_dtype

_COLUMNS = 64
"""Columns of a program."""
_POINTS = 32
"""Grid points of a piece."""


@triton.jit
def _forward(
    x, gate, out, to_grid, from_grid, columns, ROWS: tl.constexpr, ROWS_OUT: tl.constexpr,
    CHANNELS: tl.constexpr, POINTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * N + tl.arange(0, N)
    inside = column < columns
    edge = (column // CHANNELS).to(tl.int64)
    channel = column % CHANNELS
    row = tl.arange(0, R)
    where = (edge * (ROWS * CHANNELS) + channel)[:, None] + row[None, :] * CHANNELS
    where_out = (edge * (ROWS_OUT * CHANNELS) + channel)[:, None] + row[None, :] * CHANNELS
    values = tl.load(x + where, mask=inside[:, None] & (row < ROWS)[None, :], other=0.0)
    total = tl.zeros((N, R), dtype=tl.float32)
    for first in range(0, POINTS, G):
        point = first + tl.arange(0, G)
        there = tl.load(to_grid + point[None, :] * R + row[:, None])
        back = tl.load(from_grid + point[:, None] * R + row[None, :])
        grid = tl.dot(values, there, input_precision=PRECISION)
        active = grid * tl.sigmoid(grid)
        total += tl.dot(active.to(values.dtype), back, input_precision=PRECISION)
    if GATED:
        scalar = tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        scalar = scalar * tl.sigmoid(scalar)
        total = tl.where((row == 0)[None, :], scalar[:, None], total)
    tl.store(
        out + where_out, total.to(out.dtype.element_ty), mask=inside[:, None] & (row < ROWS_OUT)[None, :]
    )


@triton.jit
def _backward(
    x, gate, d_out, d_x, d_gate, to_grid, from_grid, columns, ROWS: tl.constexpr, ROWS_OUT: tl.constexpr,
    CHANNELS: tl.constexpr, POINTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * N + tl.arange(0, N)
    inside = column < columns
    edge = (column // CHANNELS).to(tl.int64)
    channel = column % CHANNELS
    row = tl.arange(0, R)
    where = (edge * (ROWS * CHANNELS) + channel)[:, None] + row[None, :] * CHANNELS
    first_out = edge * (ROWS_OUT * CHANNELS) + channel
    where_out = first_out[:, None] + row[None, :] * CHANNELS
    exists = inside[:, None] & (row < ROWS)[None, :]
    values = tl.load(x + where, mask=exists, other=0.0)
    gradients = tl.load(d_out + where_out, mask=inside[:, None] & (row < ROWS_OUT)[None, :], other=0.0)
    gradients = gradients.to(values.dtype)
    total = tl.zeros((N, R), dtype=tl.float32)
    for first in range(0, POINTS, G):
        point = first + tl.arange(0, G)
        there = tl.load(to_grid + point[None, :] * R + row[:, None])
        there_transposed = tl.load(to_grid + point[:, None] * R + row[None, :])
        back_transposed = tl.load(from_grid + point[None, :] * R + row[:, None])
        grid = tl.dot(values, there, input_precision=PRECISION)
        d_grid = tl.dot(gradients, back_transposed, input_precision=PRECISION)
        sigmoid = tl.sigmoid(grid)
        d_grid = d_grid * (sigmoid * (1.0 + grid * (1.0 - sigmoid)))
        total += tl.dot(d_grid.to(values.dtype), there_transposed, input_precision=PRECISION)
    tl.store(d_x + where, total.to(d_x.dtype.element_ty), mask=exists)
    if GATED:
        scalar = tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(scalar)
        slope = sigmoid * (1.0 + scalar * (1.0 - sigmoid))
        d_scalar = tl.load(d_out + first_out, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(d_gate + column, d_scalar.to(d_gate.dtype.element_ty), mask=inside)


def _padded(table: Tensor, dtype: torch.dtype, rows: int, without_first: bool) -> Tensor:
    """Return a table (G, R) with zeros beyond, and with a zero first row where the gate takes its place."""
    points, known = table.shape
    made = table.new_zeros(blocks(points, _POINTS) * _POINTS, rows, dtype=dtype)
    made[:points, :known] = table
    if without_first:
        made[:, 0] = 0
    return made


_prepared = Prepared(_padded)


class _S2Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        dtype = product_dtype(x)
        x, gate = x.to(dtype).contiguous(), None if gate is None else gate.contiguous()
        size = power_of_two(x.shape[1], 16)
        there, back = (
            _prepared(to_grid, dtype, size, False),
            _prepared(from_grid, dtype, size, gate is not None),
        )
        ctx.save_for_backward(x, gate, there, back)
        ctx.rows_out, ctx.precision = from_grid.shape[1], dot_precision()
        out = x.new_empty(x.shape[0], from_grid.shape[1], x.shape[2])
        _launch(_forward, x, gate, (out,), there, back, ctx.rows_out, ctx.precision)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, there, back = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        others = (grad.contiguous(), grad_x, grad_gate)
        _launch(_backward, x, gate, others, there, back, ctx.rows_out, ctx.precision)
        return grad_x, grad_gate, None, None


def _launch(
    kernel: Any,
    x: Tensor,
    gate: Tensor | None,
    others: tuple[Tensor | None, ...],
    there: Tensor,
    back: Tensor,
    rows_out: int,
    precision: str,
) -> None:
    edges, rows, channels = x.shape
    # A kernel without a gate does not touch what stands in for it.
    known = [x if tensor is None else tensor for tensor in (gate, *others)]
    launch(
        kernel, (blocks(edges * channels, _COLUMNS),), x, x, *known, there, back, edges * channels, ROWS=rows,
        ROWS_OUT=rows_out, CHANNELS=channels, POINTS=there.shape[0], R=there.shape[1], N=_COLUMNS, G=_POINTS,
        GATED=gate is not None, PRECISION=precision, num_warps=4,
    )  # fmt: skip


def s2_activation(x: Tensor, gate: Tensor | None, to_grid: Tensor, from_grid: Tensor) -> Tensor:
    """Apply SiLU on the sphere to all coefficients but the first, which becomes SiLU of a gate.

    Args:
        x: (E, R, H).
        gate: (E, H); None leaves the first coefficient to the sphere.
        to_grid: (G, R), constant.
        from_grid: (G, R'), R' ≤ R, constant.

    Returns:
        (E, R', H), with gradients for ``x`` and ``gate``.
    """
    return _S2Activation.apply(x, gate, to_grid, from_grid)
