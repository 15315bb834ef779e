"""Equivariant normalisation of node features.

Scalars are centred over their channels. Then all rows of a group are divided by the root of their mean
square, in which each degree counts alike, and multiplied by a weight for each degree and channel; scalars
get a bias. The three kinds of EquiformerV2 differ in their groups:

- ``layer_norm``: each degree is a group;
- ``layer_norm_sh``: scalars are one, all higher degrees together another;
- ``rms_norm_sh``: all degrees together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.precision import at_least_single

KINDS = ("layer_norm", "layer_norm_sh", "rms_norm_sh")


def equivariant_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
    """Normalise; with gradients to ``x``, ``weight`` and ``bias``.

    Args:
        x: (N, (L+1)², C).
        weight: (L+1, C).
        bias: (C,), on l = 0.
        eps: added to mean squares.
        kind: one of `KINDS`.

    Returns:
        (N, (L+1)², C), in single precision or better.
    """
    return _Norm.apply(x, weight, bias, eps, kind)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            lmax = len(weight) - 1
            spread, shares = _tables(lmax, kind, x.device, weight.dtype)
            centred = _centred(at_least_single(x))
            squares = torch.linalg.vecdot(centred, centred) / x.shape[2]  # (N, (L+1)²)
            inverse = (squares @ shares + eps).rsqrt()  # (N, groups)
            out = torch.empty_like(centred)
            factors = (inverse @ spread.T)[:, :, None]  # (N, L+1, 1)
            for degree, rows in enumerate(_degrees(lmax)):
                torch.mul(centred[:, rows], factors[:, degree, None] * weight[degree], out=out[:, rows])
            out[:, 0] += bias
        ctx.save_for_backward(x, weight, inverse)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            lmax, channels = len(weight) - 1, x.shape[2]
            spread, shares = _tables(lmax, ctx.kind, x.device, weight.dtype)
            centred = _centred(at_least_single(x))
            grad_x, grad_weight = torch.empty_like(centred), torch.empty_like(weight)
            along = centred.new_empty(len(x), lmax + 1)
            factors = inverse @ spread.T  # (N, L+1)
            for degree, rows in enumerate(_degrees(lmax)):
                # Σ over orders of grad · x, which both gradients need.
                products = (grad[:, rows] * centred[:, rows]).sum(dim=1)  # (N, C)
                grad_weight[degree] = factors[:, degree] @ products
                along[:, degree] = products @ weight[degree]
            # d inverse / d x = - inverse³ · share · x / C
            pull = (along @ spread) * inverse**3 / channels  # (N, groups)
            pulls = pull @ shares.T  # (N, (L+1)²)
            for degree, rows in enumerate(_degrees(lmax)):
                scaled = grad[:, rows] * (factors[:, degree, None] * weight[degree])[:, None]
                torch.addcmul(scaled, centred[:, rows], pulls[:, rows, None], value=-1, out=grad_x[:, rows])
            grad_x[:, 0] -= grad_x[:, 0].mean(dim=1, keepdim=True)
        return grad_x, grad_weight, grad[:, 0].sum(dim=0), None, None


def _centred(x: Tensor) -> Tensor:
    scalars = x[:, :1] - x[:, :1].mean(dim=2, keepdim=True)
    return torch.cat([scalars, x[:, 1:]], dim=1)


def _degrees(lmax: int) -> list[slice]:
    return [slice(degree**2, (degree + 1) ** 2) for degree in range(lmax + 1)]


@lru_cache(maxsize=64)
def _tables(lmax: int, kind: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(L+1, groups), which group a degree is in; ((L+1)², groups), the share of a row in its mean square."""
    groups = {
        "layer_norm": list(range(lmax + 1)),
        "layer_norm_sh": [0] + [1] * lmax,
        "rms_norm_sh": [0] * (lmax + 1),
    }[kind]
    spread = torch.zeros(lmax + 1, max(groups) + 1, dtype=torch.float64)
    shares = torch.zeros((lmax + 1) ** 2, max(groups) + 1, dtype=torch.float64)
    for degree, group in enumerate(groups):
        spread[degree, group] = 1
        shares[degree**2 : (degree + 1) ** 2, group] = 1 / ((2 * degree + 1) * groups.count(group))
    return spread.to(device, dtype), shares.to(device, dtype)
