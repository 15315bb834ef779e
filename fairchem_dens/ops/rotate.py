"""Both ends of each edge, in its frame, scaled: the input of the first convolution of attention.

    out[e, (l, m), :C]  = scale[e, (l, |m|), :C] · (D_e x[source of e])(l, m)
    out[e, (l, m), C:]  = scale[e, (l, |m|), C:] · (D_e x[target of e])(l, m)

Source: arXiv 2306.12059, section 4.1 (radial weights before an SO(2) convolution), arXiv 2302.03655 (frames).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import add_rows, portions
from fairchem_dens.ops.layout import Edges, Rows
from fairchem_dens.ops.precision import at_least_single
from fairchem_dens.ops.wigner import dense_rotations


def rotate_forward(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    wigner: Tensor,
    scale: Tensor,
    rows: Rows,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Do what `rotate` does, without a gradient.

    Args:
        x: (N, (L+1)², C).
        source: (E,), nodes at one end of the edges ...
        target: (E,), ... and at the other.
        wigner: (E, P), packed rotations into the frames of the edges.
        scale: (E, number of radial rows, 2C).
        rows: what is kept.
        dtype: of the result; the arithmetic is in that of ``x``.
    """
    channels = x.shape[2]
    out = x.new_empty(len(source), rows.num_kept, 2 * channels, dtype=dtype)
    for part in portions(len(source), _bytes(x, rows), x.device):
        turned = _both_ends(x, source[part], target[part], dense_rotations(wigner[part], rows))
        for rotated, scales, result in zip(
            by_order(turned, rows), _radial(scale[part], rows), by_order(out[part], rows), strict=True
        ):
            if result.dtype == rotated.dtype == scales.dtype:
                torch.mul(rotated, scales, out=result)
            else:
                result.copy_(rotated * scales)
    return out


def rotate_backward(
    grad: Tensor, x: Tensor, edges: Edges, wigner: Tensor, scale: Tensor, rows: Rows, grad_x: Tensor,
    part: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Pull a gradient back through `rotate`.

    Args:
        grad: (E', R, 2C), of the edges in ``part``.
        x: (N, (L+1)², C), as it was given to `rotate`.
        edges: all of them.
        wigner: (E', P), of the edges in ``part``.
        scale: (E', number of radial rows, 2C), of the same.
        rows: what is kept.
        grad_x: (N, (L+1)², C), to which the gradient of ``x`` is added.
        part: some of the edges.

    Returns:
        The gradient of ``scale``, (E', number of radial rows, 2C).
    """
    channels = x.shape[2]
    sources, targets = edges.source[part], edges.target[part]
    grad_scale = torch.empty_like(scale)
    for some in portions(len(sources), _bytes(x, rows), x.device):
        source, target, dense = sources[some], targets[some], dense_rotations(wigner[some], rows)
        turned = _both_ends(x, source, target, dense)
        grad_turned = torch.empty_like(turned)
        for grads, rotated, scales, grad_scales, result in zip(
            by_order(grad[some], rows), by_order(turned, rows), _radial(scale[some], rows),
            _radial(grad_scale[some], rows), by_order(grad_turned, rows), strict=True,
        ):  # fmt: skip
            grads = at_least_single(grads)
            grad_scales.copy_((grads * rotated).sum(dim=1, keepdim=True))
            result.copy_(grads * scales)
        grad_ends = torch.bmm(dense.transpose(1, 2), grad_turned)
        add_rows(grad_x, source, grad_ends[:, :, :channels])
        add_rows(grad_x, target, grad_ends[:, :, channels:])
    return grad_scale


Rotation = tuple[Callable[..., Tensor], Callable[..., Tensor]]
"""`rotate_forward` and `rotate_backward`, or what does the same faster."""


def rotate(
    x: Tensor,
    edges: Edges,
    wigner: Tensor,
    scale: Tensor,
    rows: Rows,
    rotation: Rotation = (rotate_forward, rotate_backward),
) -> Tensor:
    """Rotate and scale; with gradients to ``x`` and ``scale``.

    Args:
        x: (N, (L+1)², C).
        edges: between the N nodes.
        wigner: (E, P), packed rotations into the frames of the edges.
        scale: (E, number of radial rows, 2C).
        rows: what is kept.
        rotation: what computes it, and its gradient.

    Returns:
        (E, R, 2C), first the sources' channels.
    """
    return _Rotate.apply(x, edges, wigner, scale, rows, rotation)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, edges: Edges, wigner: Tensor, scale: Tensor, rows: Rows, rotation: Rotation
    ) -> Tensor:
        ctx.save_for_backward(x, wigner, scale)
        ctx.edges, ctx.rows, ctx.rotation = edges, rows, rotation
        return rotation[0](x, edges.source, edges.target, wigner, scale, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, wigner, scale = ctx.saved_tensors
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        grad_scale = ctx.rotation[1](grad, x, ctx.edges, wigner, scale, ctx.rows, grad_x)
        return grad_x, None, None, grad_scale, None, None


def by_order(kept: Tensor, rows: Rows) -> list[Tensor]:
    """View (E, R, C) as one tensor for each order: (E, 1, L+1, C) for 0, (E, 2, L+1-m, C) for ±m."""
    parts = kept.split(rows.sizes, dim=1)
    return [part.unflatten(1, (2 if m else 1, rows.degrees_of(m))) for m, part in enumerate(parts)]


def _radial(scale: Tensor, rows: Rows) -> list[Tensor]:
    """The same for radial weights, (E, 1, L+1-m, C) each."""
    sizes = [rows.degrees_of(m) for m in range(rows.mmax + 1)]
    return [part.unsqueeze(1) for part in scale.split(sizes, dim=1)]


def _both_ends(x: Tensor, source: Tensor, target: Tensor, dense: Tensor) -> Tensor:
    ends = torch.cat([x.index_select(0, source), x.index_select(0, target)], dim=2)
    return torch.bmm(dense.to(x.dtype), ends)


def _bytes(x: Tensor, rows: Rows) -> int:
    return x.element_size() * 2 * x.shape[2] * (2 * rows.num_full + rows.num_kept)
