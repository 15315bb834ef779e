"""Attention over the edges into a node, and the sum of its messages.

    out[n] = Σ_e a_e D_eᵀ v_e,    a_e = softmax over the edges e into n, for each head.

Source: arXiv 2306.12059, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import add_rows, portions
from fairchem_dens.ops.layout import Edges, Rows
from fairchem_dens.ops.precision import at_least_single
from fairchem_dens.ops.wigner import dense_rotations

_TINY = 1e-16
"""Added to the denominator by torch_geometric's softmax, which the paper's code uses."""


def edge_softmax(logits: Tensor, edges: Edges) -> Tensor:
    """Return the softmax of (E, heads) over the edges into each node, in single precision or better."""
    logits = at_least_single(logits)
    if edges.in_degree:
        return _by_node(logits, edges).softmax(dim=1).flatten(0, 1)
    index = edges.target[:, None].expand_as(logits)
    highest = logits.new_full((edges.num_nodes, logits.shape[1]), float("-inf"))
    highest = highest.scatter_reduce(0, index, logits.detach(), reduce="amax")
    exponentials = (logits - highest[edges.target]).exp()
    return exponentials / (_sums(exponentials, edges)[edges.target] + _TINY)


def softmax_backward(grad: Tensor, weights: Tensor, edges: Edges) -> Tensor:
    """Pull a gradient (E, heads) back through `edge_softmax`."""
    product = grad * weights
    return product - weights * _sums(product, edges)[edges.target]


def edge_weights(logits: Tensor, edges: Edges) -> Tensor:
    """Return `edge_softmax` with a gradient."""
    return _EdgeSoftmax.apply(logits, edges)


class _EdgeSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, edges: Edges) -> Tensor:
        weights = edge_softmax(logits, edges)
        ctx.save_for_backward(weights)
        ctx.edges = edges
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        return softmax_backward(grad, weights, ctx.edges), None


def attend(
    values: Tensor,
    logits: Tensor,
    wigner: Tensor,
    edges: Edges,
    rows: Rows,
    dropout: Tensor | None = None,
) -> Tensor:
    """Weight messages, rotate them back and add them up; with gradients to ``values`` and ``logits``.

    Args:
        values: (E, R, heads · V), in the frames of the edges.
        logits: (E, heads).
        wigner: (E, P), packed rotations into the frames.
        edges: into N nodes.
        rows: the layout of ``values``.
        dropout: (E, heads), factors on the softmax.

    Returns:
        (N, (L+1)², heads · V), in single precision or better; zero for a node without edges.
    """
    return _Attend.apply(values, logits, wigner, edges, rows, dropout)


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
        with torch.autocast(values.device.type, enabled=False):
            weights = edge_softmax(logits, edges)
            factors = weights if dropout is None else weights * dropout
            heads, channels = logits.shape[1], values.shape[2]
            out = factors.new_zeros(edges.num_nodes, rows.num_full, channels)
            for part in portions(len(edges), _bytes(values, rows), values.device):
                dense = dense_rotations(wigner[part], rows, rescaled=True)
                weighted = _by_head(values[part], heads) * factors[part, None, :, None]
                message = torch.bmm(dense.transpose(1, 2).to(out.dtype), weighted.flatten(2))
                add_rows(out, edges.target[part], message)
        ctx.save_for_backward(values, wigner, weights, *([] if dropout is None else [dropout]))
        ctx.edges, ctx.rows = edges, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, wigner, weights, *dropouts = ctx.saved_tensors
        edges, rows, heads = ctx.edges, ctx.rows, weights.shape[1]
        with torch.autocast(values.device.type, enabled=False):
            factors = weights * dropouts[0] if dropouts else weights
            grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
            grad_factors = torch.empty_like(weights)
            for part in portions(len(edges), _bytes(values, rows), values.device):
                dense = dense_rotations(wigner[part], rows, rescaled=True)
                pulled = torch.bmm(dense.to(grad.dtype), grad.index_select(0, edges.target[part]))
                pulled = _by_head(pulled, heads)
                grad_factors[part] = (pulled * _by_head(values[part], heads)).sum(dim=(1, 3))
                grad_values[part] = (pulled * factors[part, None, :, None]).flatten(2)
            grad_weights = grad_factors * dropouts[0] if dropouts else grad_factors
            grad_logits = softmax_backward(grad_weights, weights, edges)
        return grad_values, grad_logits, None, None, None, None


def sum_over_edges(values: Tensor, edges: Edges) -> Tensor:
    """Add up (E, ...) over the edges into each node, (N, ...)."""
    return _SumOverEdges.apply(values, edges)


class _SumOverEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        return _sums(values, edges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.edges.target), None


def _sums(values: Tensor, edges: Edges) -> Tensor:
    if edges.in_degree:
        return _by_node(values, edges).sum(dim=1)
    out = values.new_zeros(edges.num_nodes, *values.shape[1:])
    add_rows(out, edges.target, values)
    return out


def _by_node(values: Tensor, edges: Edges) -> Tensor:
    """View (E, ...) as (N, E / N, ...), where as many edges lead to each node."""
    return values.unflatten(0, (edges.num_nodes, len(edges) // max(edges.num_nodes, 1)))


def _by_head(values: Tensor, heads: int) -> Tensor:
    """View (E, R, heads · V) as (E, R, heads, V), in single precision or better."""
    return at_least_single(values).unflatten(2, (heads, -1))


def _bytes(values: Tensor, rows: Rows) -> int:
    return 4 * (values.shape[2] * 2 * (rows.num_full + rows.num_kept) + rows.num_full * rows.num_kept)
