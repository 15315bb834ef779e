"""Softmax, weighting, rotation back and sum for each target in one pass.

Nothing is kept for an edge but its weights. A program belongs to an atom and a degree and walks the edges
into that atom, as in the backward pass of `fairchem_dens.ops.fused.rotate`: sums have a fixed order.
Rotations are float32 multiply-adds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.fused.indices import edges_into, packed_row, rescale, row_of
from fairchem_dens.ops.fused.launching import blocks, launch, power_of_two
from fairchem_dens.ops.layout import Edges, Rows

_CHANNELS = 64
"""Channels of a program, which is one warp; more where a head has more."""
_EDGES = 32
"""Edges that the softmax looks at together."""
SMALLEST = 1e-16
"""Added to the sum of the exponentials, as torch_geometric's softmax does."""


@triton.jit
def _softmax(logits, row_ptr, softmax, HEADS: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
             EACH: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    node = tl.program_id(0)
    first, count = edges_into(node, row_ptr, EACH)
    head = tl.arange(0, H)
    k = tl.arange(0, K)
    if EACH > 0 and EACH <= K:  # all edges at once: what is read or computed stays in registers
        where = (first + k)[:, None] * HEADS + head[None, :]
        exists = (k < EACH)[:, None] & (head < HEADS)[None, :]
        some = tl.load(logits + where, mask=exists, other=float("-inf")).to(tl.float32)
        largest = tl.where(head < HEADS, tl.max(some, axis=0), 0.0)
        some = tl.exp(some - largest[None, :])
        total = tl.sum(some, axis=0) + SMALL
        tl.store(softmax + where, some / total[None, :], mask=exists)
    else:
        largest = tl.full((H,), float("-inf"), dtype=tl.float32)
        for start in range(0, count, K):
            where = (first + start + k)[:, None] * HEADS + head[None, :]
            exists = (start + k < count)[:, None] & (head < HEADS)[None, :]
            some = tl.load(logits + where, mask=exists, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(some.to(tl.float32), axis=0))
        # Heads that do not exist have no largest logit; a difference of infinities would not be a number.
        largest = tl.where(head < HEADS, largest, 0.0)
        total = tl.zeros((H,), dtype=tl.float32)
        for start in range(0, count, K):
            where = (first + start + k)[:, None] * HEADS + head[None, :]
            exists = (start + k < count)[:, None] & (head < HEADS)[None, :]
            some = tl.load(logits + where, mask=exists, other=float("-inf"))
            total += tl.sum(tl.exp(some.to(tl.float32) - largest[None, :]), axis=0)
        total = total + SMALL
        for start in range(0, count, K):
            where = (first + start + k)[:, None] * HEADS + head[None, :]
            exists = (start + k < count)[:, None] & (head < HEADS)[None, :]
            some = tl.load(logits + where, mask=exists, other=float("-inf"))
            some = tl.exp(some.to(tl.float32) - largest[None, :]) / total[None, :]
            tl.store(softmax + where, some, mask=exists)


@triton.jit
def _d_softmax(d_softmax, edge, head, exists, HEADS: tl.constexpr, DEGREES: tl.constexpr):
    """Sum what each degree says of the gradient of the softmax."""
    gradient = tl.zeros(exists.shape, dtype=tl.float32)
    for degree in tl.static_range(DEGREES):
        part = edge[:, None] * (DEGREES * HEADS) + degree * HEADS + head[None, :]
        gradient += tl.load(d_softmax + part, mask=exists, other=0.0)
    return gradient


@triton.jit
def _softmax_backward(softmax, d_softmax, row_ptr, d_logits, HEADS: tl.constexpr, DEGREES: tl.constexpr,
                      H: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    node = tl.program_id(0)
    first, count = edges_into(node, row_ptr, EACH)
    head = tl.arange(0, H)
    k = tl.arange(0, K)
    if EACH > 0 and EACH <= K:
        where = (first + k)[:, None] * HEADS + head[None, :]
        exists = (k < EACH)[:, None] & (head < HEADS)[None, :]
        gradient = _d_softmax(d_softmax, first + k, head, exists, HEADS, DEGREES)
        weights = tl.load(softmax + where, mask=exists, other=0.0)
        mean = tl.sum(weights * gradient, axis=0)
        gradient = weights * (gradient - mean[None, :])
        tl.store(d_logits + where, gradient.to(d_logits.dtype.element_ty), mask=exists)
    else:
        mean = tl.zeros((H,), dtype=tl.float32)
        for start in range(0, count, K):
            edge = first + start + k
            where = edge[:, None] * HEADS + head[None, :]
            exists = (start + k < count)[:, None] & (head < HEADS)[None, :]
            gradient = _d_softmax(d_softmax, edge, head, exists, HEADS, DEGREES)
            mean += tl.sum(tl.load(softmax + where, mask=exists, other=0.0) * gradient, axis=0)
        for start in range(0, count, K):
            edge = first + start + k
            where = edge[:, None] * HEADS + head[None, :]
            exists = (start + k < count)[:, None] & (head < HEADS)[None, :]
            gradient = _d_softmax(d_softmax, edge, head, exists, HEADS, DEGREES)
            gradient = tl.load(softmax + where, mask=exists, other=0.0) * (gradient - mean[None, :])
            tl.store(d_logits + where, gradient.to(d_logits.dtype.element_ty), mask=exists)


@triton.jit
def _forward(
    values, softmax, dropout, wigner, row_ptr, out, S: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, EACH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0)
    degree = tl.program_id(1)
    channel = tl.max_contiguous(tl.program_id(2) * B + tl.arange(0, B), B // 32)
    inside = channel < C
    head = channel // V
    k = tl.arange(0, K)
    total = tl.zeros((K, B), dtype=tl.float32)
    first, count = edges_into(node, row_ptr, EACH)
    for place in range(count):
        edge = first + place
        weight = tl.load(softmax + edge * (C // V) + head, mask=inside, other=0.0)
        if DROPOUT:
            weight = weight * tl.load(dropout + edge * (C // V) + head, mask=inside, other=0.0).to(tl.float32)
        for order in tl.static_range(MMAX + 1):
            if order <= degree:
                for negative in tl.static_range(2):
                    if order + 1 > negative:
                        block = edge * PACKED + packed_row(degree, (1 - 2 * negative) * order, MMAX)
                        entries = tl.load(wigner + block + k, mask=k < 2 * degree + 1, other=0.0).to(
                            tl.float32
                        )
                        row = row_of(degree, (1 - 2 * negative) * order, LMAX)
                        value = tl.load(
                            values + edge * (ROWS * C) + row * C + channel, mask=inside, other=0.0
                        )
                        total += entries[:, None] * (value.to(tl.float32) * weight)[None, :]
    where = node.to(tl.int64) * (S * C) + (degree * degree + k)[:, None] * C + channel[None, :]
    exists = (k < 2 * degree + 1)[:, None] & inside[None, :]
    total = total * rescale(degree, MMAX)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    d_out, values, softmax, dropout, wigner, row_ptr, d_values, d_softmax, S: tl.constexpr, C: tl.constexpr,
    V: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
    K: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0)
    degree = tl.program_id(1)
    channel = tl.max_contiguous(tl.program_id(2) * B + tl.arange(0, B), B // 32)
    inside = channel < C
    head = channel // V
    group = tl.program_id(2) * (B // V) + tl.arange(0, B // V)
    k = tl.arange(0, K)
    where = node.to(tl.int64) * (S * C) + (degree * degree + k)[:, None] * C + channel[None, :]
    exists = (k < 2 * degree + 1)[:, None] & inside[None, :]
    gradients = tl.load(d_out + where, mask=exists, other=0.0).to(tl.float32) * rescale(degree, MMAX)
    first, count = edges_into(node, row_ptr, EACH)
    for place in range(count):
        edge = first + place
        factor = tl.full((B,), 1.0, dtype=tl.float32)
        if DROPOUT:
            factor = tl.load(dropout + edge * (C // V) + head, mask=inside, other=0.0).to(tl.float32)
        weight = factor * tl.load(softmax + edge * (C // V) + head, mask=inside, other=0.0)
        d_weight = tl.zeros((B,), dtype=tl.float32)
        for order in tl.static_range(MMAX + 1):
            if order <= degree:
                for negative in tl.static_range(2):
                    if order + 1 > negative:
                        block = edge * PACKED + packed_row(degree, (1 - 2 * negative) * order, MMAX)
                        entries = tl.load(wigner + block + k, mask=k < 2 * degree + 1, other=0.0).to(
                            tl.float32
                        )
                        row = row_of(degree, (1 - 2 * negative) * order, LMAX)
                        place_of_row = edge * (ROWS * C) + row * C + channel
                        value = tl.load(values + place_of_row, mask=inside, other=0.0).to(tl.float32)
                        gradient = tl.sum(entries[:, None] * gradients, axis=0)
                        d_weight += gradient * value
                        d_value = gradient * weight
                        tl.store(d_values + place_of_row, d_value.to(d_values.dtype.element_ty), mask=inside)
        d_heads = tl.sum(tl.reshape(d_weight * factor, (B // V, V)), axis=1)
        part = (edge * (LMAX + 1) + degree) * (C // V) + group
        tl.store(d_softmax + part, d_heads, mask=group < C // V)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        logits: Tensor,
        wigner: Tensor,
        edges: Edges,
        rows: Rows,
        dropout: Tensor | None,
    ) -> Tensor:
        values, logits, wigner = values.contiguous(), logits.contiguous(), wigner.contiguous()
        dropout = None if dropout is None else dropout.contiguous()
        softmax = torch.empty_like(logits, dtype=torch.float32)
        heads, channels = logits.shape[1], values.shape[2]
        launch(
            _softmax, (edges.num_nodes,), logits, logits, edges.row_ptr, softmax, HEADS=heads,
            H=power_of_two(heads), K=_EDGES, EACH=edges.in_degree or 0, SMALL=SMALLEST, num_warps=1,
        )  # fmt: skip
        out = softmax.new_empty(edges.num_nodes, rows.num_full, channels)
        launch(
            _forward, _grid(edges, rows, channels, heads), values, values, softmax,
            softmax if dropout is None else dropout, wigner, edges.row_ptr, out, DROPOUT=dropout is not None,
            **_sizes(edges, rows, channels, heads), num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(values, logits, softmax, wigner, dropout)
        ctx.edges, ctx.rows = edges, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, logits, softmax, wigner, dropout = ctx.saved_tensors
        edges, rows = ctx.edges, ctx.rows
        heads, channels = logits.shape[1], values.shape[2]
        d_values, d_logits = torch.empty_like(values), torch.empty_like(logits)
        d_softmax = softmax.new_empty(len(logits), rows.lmax + 1, heads)
        launch(
            _backward, _grid(edges, rows, channels, heads), values, grad.contiguous(), values, softmax,
            softmax if dropout is None else dropout, wigner, edges.row_ptr, d_values, d_softmax,
            DROPOUT=dropout is not None, **_sizes(edges, rows, channels, heads), num_warps=1,
        )  # fmt: skip
        launch(
            _softmax_backward, (edges.num_nodes,), logits, softmax, d_softmax, edges.row_ptr, d_logits,
            HEADS=heads, DEGREES=rows.lmax + 1, H=power_of_two(heads), K=_EDGES,
            EACH=edges.in_degree or 0, num_warps=1,
        )  # fmt: skip
        return d_values, d_logits, None, None, None, None


def _block(channels: int, heads: int) -> int:
    """Return how many channels a program has: whole heads."""
    return max(_CHANNELS, channels // heads)


def _grid(edges: Edges, rows: Rows, channels: int, heads: int) -> tuple[int, int, int]:
    return edges.num_nodes, rows.lmax + 1, blocks(channels, _block(channels, heads))


def _sizes(edges: Edges, rows: Rows, channels: int, heads: int) -> dict[str, int]:
    return {
        "S": rows.num_full, "C": channels, "V": channels // heads, "ROWS": rows.num_kept,
        "PACKED": rows.num_packed, "LMAX": rows.lmax, "MMAX": rows.mmax, "K": power_of_two(2 * rows.lmax + 1),
        "B": _block(channels, heads), "EACH": edges.in_degree or 0,
    }  # fmt: skip


def attend(
    values: Tensor,
    logits: Tensor,
    wigner: Tensor,
    edges: Edges,
    rows: Rows,
    dropout: Tensor | None = None,
) -> Tensor:
    """Sum what the edges into each node bring, weighted by the softmax over these edges.

    Args:
        values: (E, R, heads · V), in the frames of the edges; V a power of two.
        logits: (E, heads).
        wigner: (E, P), packed rotations into these frames, undone here.
        edges: sorted by target.
        rows: kept coefficients.
        dropout: (E, heads), factors of the softmax.

    Returns:
        (N, (L+1)², heads · V), in single precision, zero for a node without edges; with
        gradients for ``values`` and ``logits``.
    """
    return _Attend.apply(values, logits, wigner, edges, rows, dropout)
