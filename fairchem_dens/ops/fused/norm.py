"""Equivariant normalisation, one pass over the features forward and one backward.

A program holds all features of a node. In the backward pass each program takes several nodes, so that it
can add up its part of the weights' gradients before it writes them; the parts are then added in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.fused.launching import blocks, launch, power_of_two

_PROGRAMS = 256
"""Programs of the backward pass, whatever the GPU, so that sums do not depend on it."""
_CHANNELS = 64
"""Channels of a program that adds up what those have written."""
SPLIT = {"layer_norm_sh": True, "rms_norm_sh": False}
"""Kinds that there is a kernel for, and whether scalars are a group of their own."""


@triton.jit
def _load_centred(x, S: tl.constexpr, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    row = tl.arange(0, R)
    channel = tl.arange(0, B)
    exists = (row < S)[:, None] & (channel < C)[None, :]
    values = tl.load(x + row[:, None] * C + channel[None, :], mask=exists, other=0.0).to(tl.float32)
    scalar = (row == 0)[:, None] & (channel < C)[None, :]
    mean = tl.sum(tl.sum(tl.where(scalar, values, 0.0), axis=0), axis=0) / C
    return tl.where(scalar, values - mean, values)


@triton.jit
def _degree_of(row, LMAX: tl.constexpr):
    degree = tl.zeros_like(row)
    for one in tl.static_range(1, LMAX + 1):
        degree += (row >= one * one).to(tl.int32)
    return degree


@triton.jit
def _share_of(row, LMAX: tl.constexpr, SPLIT: tl.constexpr):
    """The share of a row in the mean square of its group."""
    width = (2 * _degree_of(row, LMAX) + 1).to(tl.float32)
    share = 1.0 / (width * (LMAX + 1))
    if SPLIT:
        share = tl.where(row == 0, 1.0, 1.0 / (width * LMAX))
    return tl.where(row < (LMAX + 1) * (LMAX + 1), share, 0.0)


@triton.jit
def _by_group(numbers, row, SPLIT: tl.constexpr):
    """Sum the numbers of rows over the group of each."""
    if SPLIT:
        scalar = tl.sum(tl.where(row == 0, numbers, 0.0), axis=0)
        other = tl.sum(tl.where(row == 0, 0.0, numbers), axis=0)
        return tl.where(row == 0, scalar, other)
    return tl.zeros_like(numbers) + tl.sum(numbers, axis=0)


@triton.jit
def _forward(
    x, weight, bias, out, eps, S: tl.constexpr, C: tl.constexpr, LMAX: tl.constexpr, SPLIT: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, R)
    channel = tl.arange(0, B)
    exists = (row < S)[:, None] & (channel < C)[None, :]
    values = _load_centred(x + node * (S * C), S, C, R, B)
    squares = tl.sum(values * values, axis=1) / C
    inverse = 1.0 / tl.sqrt(_by_group(squares * _share_of(row, LMAX, SPLIT), row, SPLIT) + eps)
    where = _degree_of(row, LMAX)[:, None] * C + channel[None, :]
    weights = tl.load(weight + where, mask=exists, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    result = values * inverse[:, None] * weights
    result += tl.where(row == 0, 1.0, 0.0)[:, None] * shift[None, :]
    where = node * (S * C) + row[:, None] * C + channel[None, :]
    tl.store(out + where, result, mask=exists)


@triton.jit
def _backward(
    d_out, x, weight, d_x, parts, nodes, eps, S: tl.constexpr, C: tl.constexpr, LMAX: tl.constexpr,
    SPLIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, R)
    channel = tl.arange(0, B)
    exists = (row < S)[:, None] & (channel < C)[None, :]
    share = _share_of(row, LMAX, SPLIT)
    where_weight = _degree_of(row, LMAX)[:, None] * C + channel[None, :]
    weights = tl.load(weight + where_weight, mask=exists, other=0.0).to(tl.float32)
    d_weight = tl.zeros((R, B), dtype=tl.float32)
    d_bias = tl.zeros((B,), dtype=tl.float32)
    for node in range(tl.program_id(0).to(tl.int64), nodes, PROGRAMS):
        values = _load_centred(x + node * (S * C), S, C, R, B)
        where = node * (S * C) + row[:, None] * C + channel[None, :]
        gradient = tl.load(d_out + where, mask=exists, other=0.0).to(tl.float32)
        squares = tl.sum(values * values, axis=1) / C
        inverse = 1.0 / tl.sqrt(_by_group(squares * share, row, SPLIT) + eps)
        d_weight += gradient * values * inverse[:, None]
        d_bias += tl.sum(tl.where((row == 0)[:, None], gradient, 0.0), axis=0)
        gradient = gradient * weights
        pull = _by_group(tl.sum(gradient * values, axis=1), row, SPLIT) * inverse * inverse * inverse / C
        result = gradient * inverse[:, None] - values * (share * pull)[:, None]
        scalar = (row == 0)[:, None] & (channel < C)[None, :]
        mean = tl.sum(tl.sum(tl.where(scalar, result, 0.0), axis=0), axis=0) / C
        result = tl.where(scalar, result - mean, result)
        tl.store(d_x + where, result.to(d_x.dtype.element_ty), mask=exists)
    part = parts + tl.program_id(0) * ((S + 1) * C)
    tl.store(part + row[:, None] * C + channel[None, :], d_weight, mask=exists)
    tl.store(part + S * C + channel, d_bias, mask=channel < C)


@triton.jit
def _add_parts(parts, d_weight, d_bias, S: tl.constexpr, C: tl.constexpr, LMAX: tl.constexpr, B: tl.constexpr,
               PROGRAMS: tl.constexpr):  # fmt: skip
    degree = tl.program_id(0)
    channel = tl.program_id(1) * B + tl.arange(0, B)
    inside = channel < C
    total = tl.zeros((B,), dtype=tl.float32)
    # One more than there are degrees: the last one is the bias.
    first = degree * degree
    last = tl.where(degree > LMAX, first + 1, first + 2 * degree + 1)
    for program in range(PROGRAMS):
        for row in range(first, last):
            total += tl.load(parts + program * ((S + 1) * C) + row * C + channel, mask=inside, other=0.0)
    if degree > LMAX:
        tl.store(d_bias + channel, total.to(d_bias.dtype.element_ty), mask=inside)
    else:
        tl.store(d_weight + degree * C + channel, total.to(d_weight.dtype.element_ty), mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        out = torch.empty_like(x, dtype=torch.float32)
        launch(_forward, (len(x),), x, x, weight, bias, out, eps, **_sizes(x, weight, kind), num_warps=4)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.kind, ctx.bias_dtype = eps, kind, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        lmax, channels = len(weight) - 1, x.shape[2]
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(channels, dtype=ctx.bias_dtype)
        programs = min(_PROGRAMS, len(x))
        parts = x.new_empty(programs, x.shape[1] + 1, channels, dtype=torch.float32)
        launch(
            _backward, (programs,), x, grad.contiguous(), x, weight, grad_x, parts, len(x), ctx.eps,
            **_sizes(x, weight, ctx.kind), PROGRAMS=programs, num_warps=8,
        )  # fmt: skip
        if programs:
            launch(
                _add_parts, (lmax + 2, blocks(channels, _CHANNELS)), x, parts, grad_weight, grad_bias,
                S=x.shape[1], C=channels, LMAX=lmax, B=_CHANNELS, PROGRAMS=programs, num_warps=1,
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None, None


def _sizes(x: Tensor, weight: Tensor, kind: str) -> dict[str, int]:
    _, rows, channels = x.shape
    return {
        "S": rows, "C": channels, "LMAX": len(weight) - 1, "SPLIT": SPLIT[kind], "R": power_of_two(rows),
        "B": power_of_two(channels),
    }  # fmt: skip


def equivariant_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str) -> Tensor:
    """Normalise; with gradients to ``x``, ``weight`` and ``bias``.

    Args:
        x: (N, (L+1)², C).
        weight: (L+1, C).
        bias: (C,), on l = 0.
        eps: added to mean squares.
        kind: one of `SPLIT`.

    Returns:
        (N, (L+1)², C), in single precision.
    """
    return _Norm.apply(x, weight, bias, eps, kind)
