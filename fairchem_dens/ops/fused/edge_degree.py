"""Harmonics of edges, weighted and summed into each node; a program belongs to a node and a degree."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.fused.indices import edges_into, packed_row, rescale
from fairchem_dens.ops.fused.launching import blocks, launch, power_of_two
from fairchem_dens.ops.layout import Edges, Rows

_CHANNELS = 64
"""Channels of a program, which is one warp."""


@triton.jit
def _forward(
    radial, wigner, row_ptr, out, S: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr,
    MMAX: tl.constexpr, K: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0)
    degree = tl.program_id(1)
    channel = tl.program_id(2) * B + tl.arange(0, B)
    inside = channel < C
    k = tl.arange(0, K)
    total = tl.zeros((K, B), dtype=tl.float32)
    first, count = edges_into(node, row_ptr, EACH)
    for place in range(count):
        edge = first + place
        block = edge * PACKED + packed_row(degree, 0, MMAX)
        harmonics = tl.load(wigner + block + k, mask=k < 2 * degree + 1, other=0.0).to(tl.float32)
        where = edge * ((LMAX + 1) * C) + degree * C + channel
        total += harmonics[:, None] * tl.load(radial + where, mask=inside, other=0.0).to(tl.float32)[None, :]
    where = node.to(tl.int64) * (S * C) + (degree * degree + k)[:, None] * C + channel[None, :]
    tl.store(out + where, total * rescale(degree, MMAX), mask=(k < 2 * degree + 1)[:, None] & inside[None, :])


@triton.jit
def _backward(
    d_out, wigner, row_ptr, d_radial, S: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    LMAX: tl.constexpr, MMAX: tl.constexpr, K: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0)
    degree = tl.program_id(1)
    channel = tl.program_id(2) * B + tl.arange(0, B)
    inside = channel < C
    k = tl.arange(0, K)
    where = node.to(tl.int64) * (S * C) + (degree * degree + k)[:, None] * C + channel[None, :]
    exists = (k < 2 * degree + 1)[:, None] & inside[None, :]
    gradients = tl.load(d_out + where, mask=exists, other=0.0).to(tl.float32) * rescale(degree, MMAX)
    first, count = edges_into(node, row_ptr, EACH)
    for place in range(count):
        edge = first + place
        block = edge * PACKED + packed_row(degree, 0, MMAX)
        harmonics = tl.load(wigner + block + k, mask=k < 2 * degree + 1, other=0.0).to(tl.float32)
        gradient = tl.sum(harmonics[:, None] * gradients, axis=0)
        where_radial = edge * ((LMAX + 1) * C) + degree * C + channel
        tl.store(d_radial + where_radial, gradient.to(d_radial.dtype.element_ty), mask=inside)


class _EdgeDegree(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, radial: Tensor, wigner: Tensor, edges: Edges, rows: Rows) -> Tensor:
        radial, wigner = radial.contiguous(), wigner.contiguous()
        channels = radial.shape[2]
        out = radial.new_empty(edges.num_nodes, rows.num_full, channels, dtype=torch.float32)
        launch(
            _forward,
            _grid(edges, rows, channels),
            radial,
            radial,
            wigner,
            edges.row_ptr,
            out,
            **_sizes(edges, rows, channels),
        )
        ctx.save_for_backward(wigner)
        ctx.edges, ctx.rows, ctx.dtype = edges, rows, radial.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (wigner,) = ctx.saved_tensors
        edges, rows, channels = ctx.edges, ctx.rows, grad.shape[2]
        grad_radial = grad.new_empty(len(edges), rows.lmax + 1, channels, dtype=ctx.dtype)
        launch(
            _backward, _grid(edges, rows, channels), grad, grad.contiguous(), wigner, edges.row_ptr,
            grad_radial, **_sizes(edges, rows, channels),
        )  # fmt: skip
        return grad_radial, None, None, None


def _grid(edges: Edges, rows: Rows, channels: int) -> tuple[int, int, int]:
    return edges.num_nodes, rows.lmax + 1, blocks(channels, _CHANNELS)


def _sizes(edges: Edges, rows: Rows, channels: int) -> dict[str, int]:
    return {
        "S": rows.num_full, "C": channels, "PACKED": rows.num_packed, "LMAX": rows.lmax, "MMAX": rows.mmax,
        "K": power_of_two(2 * rows.lmax + 1), "B": _CHANNELS,
        "EACH": edges.in_degree or 0, "num_warps": 1,
    }  # fmt: skip


def edge_degree(radial: Tensor, wigner: Tensor, edges: Edges, rows: Rows) -> Tensor:
    """Sum the weighted harmonics of the edges into each node; with a gradient to ``radial``.

    Args:
        radial: (E, L+1, C).
        wigner: (E, P), packed rotations, whose rows m = 0 are the harmonics.
        edges: into N nodes.
        rows: what is kept.

    Returns:
        (N, (L+1)², C), in single precision.
    """
    return _EdgeDegree.apply(radial, wigner, edges, rows)
