"""Gather, rotate, scale: forward by edges, backward by atoms.

Rotations are applied as float32 multiply-adds, whatever the precision of the features: the entries of a
Wigner matrix in half precision would cost accuracy, and this kernel waits for memory, not for arithmetic.

In the backward pass a program belongs to an atom and a degree, holds the atom's coefficients, and walks the
edges that leave and those that enter it. So each gradient is read once, sums have a fixed order, and no two
programs write to the same place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_dens.ops import rotate as plain
from fairchem_dens.ops.fused.indices import edges_into, packed_row, radial_row_of, row_of
from fairchem_dens.ops.fused.launching import blocks, launch, power_of_two
from fairchem_dens.ops.layout import Edges, Rows

_CHANNELS = 64
"""Channels of a program, which is one warp."""


@triton.jit
def _forward_degree(
    degree: tl.constexpr, x, of_source, of_target, wigner, scale, out, channel, inside, C: tl.constexpr,
    LMAX: tl.constexpr, MMAX: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * degree + 1
    K: tl.constexpr = (
        1 if degree == 0 else (4 if degree == 1 else (8 if degree < 4 else (16 if degree < 8 else 32)))
    )
    TOP: tl.constexpr = degree if degree < MMAX else MMAX
    k = tl.arange(0, K)
    where = (degree * degree + k)[:, None] * C + channel[None, :]
    exists = (k < WIDTH)[:, None] & inside[None, :]
    from_source = tl.load(x + of_source + where, mask=exists, other=0.0).to(tl.float32)
    from_target = tl.load(x + of_target + where, mask=exists, other=0.0).to(tl.float32)
    for order in tl.static_range(TOP + 1):
        weight = scale + radial_row_of(degree, order, LMAX) * (2 * C) + channel
        weight_source = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        weight_target = tl.load(weight + C, mask=inside, other=0.0).to(tl.float32)
        for negative in tl.static_range(2):
            if order + 1 > negative:
                block = wigner + packed_row(degree, (1 - 2 * negative) * order, MMAX)
                entries = tl.load(block + k, mask=k < WIDTH, other=0.0).to(tl.float32)
                row = out + row_of(degree, (1 - 2 * negative) * order, LMAX) * (2 * C) + channel
                value = tl.sum(entries[:, None] * from_source, axis=0) * weight_source
                tl.store(row, value.to(out.dtype.element_ty), mask=inside)
                value = tl.sum(entries[:, None] * from_target, axis=0) * weight_target
                tl.store(row + C, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    x, source, target, wigner, scale, out, S: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    RADIAL: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    edge = tl.program_id(0).to(tl.int64)
    channel = tl.max_contiguous(tl.program_id(1) * B + tl.arange(0, B), B // 32)
    inside = channel < C
    of_source = tl.load(source + edge).to(tl.int64) * (S * C)
    of_target = tl.load(target + edge).to(tl.int64) * (S * C)
    for degree in tl.static_range(LMAX + 1):
        _forward_degree(
            degree, x, of_source, of_target, wigner + edge * PACKED, scale + edge * (RADIAL * 2 * C),
            out + edge * (ROWS * 2 * C), channel, inside, C, LMAX, MMAX,
        )  # fmt: skip


@triton.jit
def _add_edge(
    total, values, edge, degree, d_out, wigner, scale, d_scale, channel, inside, C: tl.constexpr,
    ROWS: tl.constexpr, RADIAL: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, K)
    for order in tl.static_range(MMAX + 1):
        if order <= degree:
            radial = edge * (RADIAL * 2 * C) + radial_row_of(degree, order, LMAX) * (2 * C) + channel
            weight = tl.load(scale + radial, mask=inside, other=0.0).to(tl.float32)
            d_weight = tl.zeros_like(weight)
            for negative in tl.static_range(2):
                if order + 1 > negative:
                    block = edge * PACKED + packed_row(degree, (1 - 2 * negative) * order, MMAX)
                    entries = tl.load(wigner + block + k, mask=k < 2 * degree + 1, other=0.0).to(tl.float32)
                    row = row_of(degree, (1 - 2 * negative) * order, LMAX)
                    where = edge * (ROWS * 2 * C) + row * (2 * C) + channel
                    gradient = tl.load(d_out + where, mask=inside, other=0.0).to(tl.float32)
                    d_weight += gradient * tl.sum(entries[:, None] * values, axis=0)
                    total += entries[:, None] * (gradient * weight)[None, :]
            tl.store(d_scale + radial, d_weight.to(d_scale.dtype.element_ty), mask=inside)
    return total


@triton.jit(do_not_specialize=["start", "stop"])
def _backward(
    d_out, x, wigner, scale, d_x, d_scale, source_ptr, by_source, row_ptr, start, stop, S: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, RADIAL: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr,
    MMAX: tl.constexpr, K: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0)
    degree = tl.program_id(1)
    channel = tl.max_contiguous(tl.program_id(2) * B + tl.arange(0, B), B // 32)
    inside = channel < C
    k = tl.arange(0, K)
    where = node.to(tl.int64) * (S * C) + (degree * degree + k)[:, None] * C + channel[None, :]
    exists = (k < 2 * degree + 1)[:, None] & inside[None, :]
    values = tl.load(x + where, mask=exists, other=0.0).to(tl.float32)
    total = tl.load(d_x + where, mask=exists, other=0.0).to(tl.float32)
    # Only edges start..stop are there, and their arrays begin with the first of them.
    for place in range(tl.load(source_ptr + node), tl.load(source_ptr + node + 1)):
        edge = tl.load(by_source + place).to(tl.int64)
        if (edge >= start) & (edge < stop):
            total = _add_edge(
                total, values, edge - start, degree, d_out, wigner, scale, d_scale, channel, inside, C, ROWS,
                RADIAL, PACKED, LMAX, MMAX, K,
            )  # fmt: skip
    first, count = edges_into(node, row_ptr, EACH)
    for edge in range(tl.maximum(first, start), tl.minimum(first + count, stop)):
        total = _add_edge(
            total, values, edge - start, degree, d_out + C, wigner, scale + C, d_scale + C, channel, inside,
            C, ROWS, RADIAL, PACKED, LMAX, MMAX, K,
        )  # fmt: skip
    tl.store(d_x + where, total.to(d_x.dtype.element_ty), mask=exists)


def rotate_forward(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    wigner: Tensor,
    scale: Tensor,
    rows: Rows,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the features of sources and targets into the frames of their edges, and scale them.

    Args:
        x: (N, (L+1)², C).
        source: (E,), nodes at one end of the edges ...
        target: (E,), ... and at the other.
        wigner: (E, P), packed rotations.
        scale: (E, num_radial, 2C), first for the sources.
        rows: kept coefficients.
        dtype: of the result; that of ``x`` if not given.

    Returns:
        (E, R, 2C), sources first.
    """
    num_edges, channels = len(source), x.shape[2]
    x, wigner, scale = x.contiguous(), wigner.contiguous(), scale.contiguous()
    out = x.new_empty(num_edges, rows.num_kept, 2 * channels, dtype=dtype or x.dtype)
    launch(
        _forward, (num_edges, blocks(channels, _CHANNELS)), x, x, source.contiguous(), target.contiguous(),
        wigner, scale, out, S=rows.num_full, C=channels, ROWS=rows.num_kept, RADIAL=rows.num_radial,
        PACKED=rows.num_packed, LMAX=rows.lmax, MMAX=rows.mmax, B=_CHANNELS, num_warps=1,
    )  # fmt: skip
    return out


def rotate_backward(
    grad: Tensor, x: Tensor, edges: Edges, wigner: Tensor, scale: Tensor, rows: Rows, grad_x: Tensor,
    part: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Pull a gradient back through `rotate_forward`.

    Args:
        grad: (E', R, 2C), of the edges in ``part``.
        x: (N, (L+1)², C), as in the forward pass.
        edges: all of them.
        wigner: (E', P), of the edges in ``part``.
        scale: (E', num_radial, 2C), of the same.
        rows: kept coefficients.
        grad_x: (N, (L+1)², C), to which the gradient of ``x`` is added.
        part: some of the edges.

    Returns:
        The gradient of ``scale``, (E', num_radial, 2C).
    """
    channels = x.shape[2]
    start, stop, _ = part.indices(len(edges))
    grad, x, wigner, scale = grad.contiguous(), x.contiguous(), wigner.contiguous(), scale.contiguous()
    grad_scale, total = torch.empty_like(scale), grad_x.contiguous()
    launch(
        _backward, (len(x), rows.lmax + 1, blocks(channels, _CHANNELS)), x, grad, x, wigner, scale, total,
        grad_scale, edges.source_ptr, edges.by_source, edges.row_ptr, start, stop, S=rows.num_full,
        C=channels, ROWS=rows.num_kept, RADIAL=rows.num_radial, PACKED=rows.num_packed, LMAX=rows.lmax,
        MMAX=rows.mmax, K=power_of_two(2 * rows.lmax + 1), B=_CHANNELS, EACH=edges.in_degree or 0,
        num_warps=1,
    )  # fmt: skip
    if total is not grad_x:
        grad_x.copy_(total)
    return grad_scale


def rotate(x: Tensor, edges: Edges, wigner: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """Do what `rotate_forward` does, with gradients for ``x`` and ``scale``."""
    return plain.rotate(x, edges, wigner, scale, rows, rotation=(rotate_forward, rotate_backward))
