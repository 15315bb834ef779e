"""Convolutions in SO(2): one matrix product for each order.

For an order m > 0 the coefficients of +m and -m are the real and imaginary part of a complex number that
a complex weight W_r + i W_i multiplies. With the layout of `Rows` that is one real product,

    [x_+ | x_-] [[W_r, -W_i], [W_i, W_r]]ᵀ,

without any sorting or adding of parts before or after it.

Source: arXiv 2302.03655, section 3.2; arXiv 2306.12059, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import portions
from fairchem_dens.ops.layout import Edges, Rows
from fairchem_dens.ops.precision import product_dtype
from fairchem_dens.ops.rotate import Rotation, rotate_backward, rotate_forward


def real_weight(weight: Tensor) -> Tensor:
    """Return the real form of a complex weight.

    Args:
        weight: (2 O, I), W_r above W_i.

    Returns:
        (2 O, 2 I), [[W_r, -W_i], [W_i, W_r]].
    """
    real, imaginary = weight.chunk(2)
    return torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])


def convolve(x: Tensor, weights: Sequence[Tensor], bias: Tensor, rows: Rows) -> Tensor:
    """Convolve features in the frames of edges.

    Args:
        x: (E, R, I).
        weights: one for each order, (O_m, columns of the order · I), real.
        bias: (O_0,), for order 0.
        rows: the layout of ``x``.

    Returns:
        (E, ΣO_m): the outputs of the orders, one after the other.
    """
    parts = x.flatten(1).split([size * x.shape[2] for size in rows.sizes], dim=1)
    outputs = [F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]
    outputs[0] = outputs[0] + bias.to(outputs[0].dtype)
    return torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class RadialTail:
    """The last layer of a radial function.

    Attributes:
        hidden: (E, K), what it is applied to.
        weight: (number of radial rows · 2C, K).
        bias: (number of radial rows · 2C,).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def rotate_and_convolve(
    x: Tensor,
    edges: Edges,
    wigner: Tensor,
    radial: RadialTail,
    weights: Sequence[Tensor],
    bias: Tensor,
    rows: Rows,
    rotation: Rotation = (rotate_forward, rotate_backward),
) -> Tensor:
    """Radial weights, `rotate` and `convolve` in one, portion by portion.

    Neither the radial weights nor the rotated features are ever there for all edges, and neither is kept
    for the gradient: from ``x`` and the hidden features of the radial function they are made again. They
    are the largest tensors of the model after the grids.

    Args:
        x: (N, (L+1)², C).
        edges: between the N nodes.
        wigner: (E, P), packed rotations.
        radial: gives the scales of `rotate`.
        weights: one for each order, (O_m, columns of the order · 2C), real.
        bias: (O_0,), for order 0.
        rows: what is kept.
        rotation: `rotate_forward` and `rotate_backward`, or what does the same faster.

    Returns:
        (E, ΣO_m), as `convolve` does; in autocast's precision where it is on.
    """
    return _RotateAndConvolve.apply(
        x, edges, wigner, radial.hidden, radial.weight, radial.bias, rows, rotation, bias, *weights
    )


class _RotateAndConvolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        edges: Edges,
        wigner: Tensor,
        hidden: Tensor,
        radial_weight: Tensor,
        radial_bias: Tensor,
        rows: Rows,
        rotation: Rotation,
        bias: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, wigner, hidden, radial_weight, radial_bias, bias, *weights)
        ctx.edges, ctx.rows, ctx.rotation, ctx.dtype = edges, rows, rotation, product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            cast = _Cast(ctx.dtype, hidden, radial_weight, radial_bias, weights)
            sizes = [len(weight) for weight in weights]
            out = x.new_empty(len(edges), sum(sizes), dtype=ctx.dtype)
            for part in portions(len(edges), _bytes(x, rows), x.device, least=256):
                scale = cast.scale(part, rows)
                features = rotation[0](
                    x, edges.source[part], edges.target[part], wigner[part], scale, rows, ctx.dtype
                ).flatten(1)
                inputs = features.split([size * 2 * x.shape[2] for size in rows.sizes], dim=1)
                outputs = out[part].split(sizes, dim=1)
                for features_m, weight, result in zip(inputs, cast.weights, outputs, strict=True):
                    torch.mm(features_m, weight.T, out=result)
                outputs[0].add_(bias.to(ctx.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, wigner, hidden, radial_weight, radial_bias, bias, *weights = ctx.saved_tensors
        edges, rows = ctx.edges, ctx.rows
        with torch.autocast(x.device.type, enabled=False):
            cast = _Cast(ctx.dtype, hidden, radial_weight, radial_bias, weights)
            sizes = [len(weight) for weight in weights]
            grad_x, grad_hidden = torch.zeros_like(x), torch.empty_like(cast.hidden)
            grad_radial_weight, grad_radial_bias = (
                torch.zeros_like(one) for one in (radial_weight, radial_bias)
            )
            grad_weights = [torch.zeros_like(weight) for weight in weights]
            for part in portions(len(edges), _bytes(x, rows), x.device, least=256):
                scale = cast.scale(part, rows)
                features = ctx.rotation[0](
                    x, edges.source[part], edges.target[part], wigner[part], scale, rows, ctx.dtype
                )
                grad_features = torch.empty_like(features)
                widths = [size * 2 * x.shape[2] for size in rows.sizes]
                for grad_m, features_m, grad_features_m, weight, grad_weight in zip(
                    grad[part].split(sizes, dim=1),
                    features.flatten(1).split(widths, dim=1),
                    grad_features.flatten(1).split(widths, dim=1),
                    cast.weights,
                    grad_weights,
                    strict=True,
                ):
                    _add_product(grad_weight, grad_m.T, features_m)
                    torch.mm(grad_m, weight, out=grad_features_m)
                del features
                grad_scale = ctx.rotation[1](
                    grad_features, x, edges, wigner[part], scale, rows, grad_x, part
                ).flatten(1)
                grad_radial_bias += grad_scale.sum(dim=0)
                _add_product(grad_radial_weight, grad_scale.T, cast.hidden[part])
                torch.mm(grad_scale, cast.radial_weight, out=grad_hidden[part])
            grad_bias = grad[:, : sizes[0]].sum(dim=0, dtype=bias.dtype)
        of_radial = grad_hidden, grad_radial_weight, grad_radial_bias
        return grad_x, None, None, *of_radial, None, None, grad_bias, *grad_weights


class _Cast:
    """The operands of matrix products in the precision of these."""

    def __init__(
        self,
        dtype: torch.dtype,
        hidden: Tensor,
        radial_weight: Tensor,
        radial_bias: Tensor,
        weights: Sequence[Tensor],
    ) -> None:
        self.hidden, self.radial_weight, self.radial_bias, *self.weights = (
            one.to(dtype) for one in (hidden, radial_weight, radial_bias, *weights)
        )

    def scale(self, part: slice, rows: Rows) -> Tensor:
        flat = torch.addmm(self.radial_bias, self.hidden[part], self.radial_weight.T)
        return flat.unflatten(1, (rows.num_radial, -1))


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add a product to a sum over portions, which is in full precision."""
    if total.dtype == one.dtype == other.dtype:
        total.addmm_(one, other)
    else:
        total.add_(one.to(other.dtype) @ other)


def _bytes(x: Tensor, rows: Rows) -> int:
    return x.element_size() * 2 * x.shape[2] * (3 * rows.num_kept + 2 * rows.num_radial)
