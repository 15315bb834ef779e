"""Equivariant layer norm."""

from __future__ import annotations

from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens.models.equiformer.features import SCALAR, Features


class EquivariantLayerNorm(nn.Module):
    """Divides each irrep by the root mean square of its components over all channels.

    Scalars are centred first and get a bias; each channel has a weight.

    Args:
        irreps: of input and output.
        eps: added to the mean square.
    """

    def __init__(self, irreps: o3.Irreps, eps: float = 1e-5) -> None:
        super().__init__()
        self.irreps, self.eps = irreps, eps
        self.affine_weight = nn.Parameter(torch.ones(irreps.num_irreps))
        self.affine_bias = nn.Parameter(torch.zeros(irreps.count(SCALAR)))

    def forward(self, x: Features) -> Features:
        """Keep the shape."""
        weights = self.affine_weight.split([mul for mul, _ in self.irreps])
        out = []
        for (_, ir), one, weight in zip(self.irreps, x, weights, strict=True):
            normed, _ = _Normalised.apply(one.to(weight.dtype), self.eps, ir == SCALAR)  # type: ignore[no-untyped-call]
            out.append(torch.addcmul(self.affine_bias, normed, weight) if ir == SCALAR else normed * weight)
        return out


class _Normalised(torch.autograd.Function):
    """x to y = s u, and s: u is x (centred, if asked for), s the inverse of its root mean square.

    With n components and <a, b> the sum of products over all of them, ∂s/∂u = −s² y / n, and the gradient of
    y carries h back as s (h − y <y, h> / n). Each is written in as few operations as torch has for it; that
    these are about 20 for all that training through forces needs, in place of 60, is all that this is for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
        u = _centred(x) if centred else x
        scale = _dot(u, u, start=eps).rsqrt_()
        normed = u * scale
        ctx.centred = centred
        ctx.save_for_backward(normed, scale)
        ctx.set_materialize_grads(False)
        return normed, scale

    @staticmethod
    def backward(ctx: Any, by_normed: Tensor | None, by_scale: Tensor | None) -> tuple[Any, ...]:
        normed, scale = ctx.saved_tensors
        out: Tensor | None = None
        if by_normed is not None:
            out = _Carried.apply(normed, scale, by_normed, ctx.centred)  # type: ignore[no-untyped-call]
        if by_scale is not None:
            along = by_scale * scale.square() * (-1 / _size(normed))
            out = normed * along if out is None else torch.addcmul(out, normed, along)
        return out, None, None


class _Carried(torch.autograd.Function):
    """(y, s, h) to s (h − y <y, h> / n), centred if asked for; y is centred then."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, scale: Tensor, h: Tensor, centred: bool) -> Tensor:
        ctx.centred = centred
        ctx.save_for_backward(normed, scale, h)
        out = torch.addcmul(h, normed, _dot(normed, h), value=-1 / _size(h)).mul_(scale)
        return _centred(out) if centred else out

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        normed, scale, h = ctx.saved_tensors
        n = _size(h)
        if ctx.centred:
            v = _centred(v)
        v_h, v_y, y_h = _dot(v, h), _dot(v, normed), _dot(normed, h)
        by_normed = torch.addcmul(v * y_h, h, v_y) * (scale / -n)
        by_scale = torch.addcmul(v_h, v_y, y_h, value=-1 / n)
        by_h = torch.addcmul(v, normed, v_y, value=-1 / n) * scale
        return by_normed, by_scale, by_h, None


def _dot(a: Tensor, b: Tensor, start: float | None = None) -> Tensor:
    """<a, b> of (N, D, C), as (N, 1, 1); with a start, that plus <a, b> / n."""
    rows, columns = a.flatten(1)[:, None], b.flatten(1)[:, :, None]
    # Mixed precision would round it.
    with torch.autocast(a.device.type, enabled=False):
        if start is None:
            return rows @ columns
        return torch.baddbmm(a.new_full((1, 1, 1), start), rows, columns, alpha=1 / _size(a))


def _size(x: Tensor) -> int:
    """The number of components that a sum runs over."""
    return x.shape[1] * x.shape[2]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)
