"""Packed rotations from the frames of edges, in one kernel, by the formula of `fairchem_dens.ops.wigner`.

Each entry is a sum of four products of d(β) at (±m, ±m') with cosines and sines. The four are evaluated from
tables of their own, so that no entry needs another one.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_dens.ops import wigner as plain
from fairchem_dens.ops.fused.launching import blocks, launch
from fairchem_dens.ops.layout import Rows

_EDGES, _ENTRIES = 4, 64
"""Edges and entries of a program."""


@triton.jit
def _forward(
    frames, tables, orders, out, edges, LMAX: tl.constexpr, PACKED: tl.constexpr, E: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    edge = tl.program_id(0) * E + tl.arange(0, E)
    entry = tl.program_id(1) * P + tl.arange(0, P)
    inside, known = edge < edges, entry < PACKED
    frame = frames + edge * 9
    xx = tl.load(frame, mask=inside, other=1.0)
    xy = tl.load(frame + 1, mask=inside, other=0.0)
    xz = tl.load(frame + 2, mask=inside, other=0.0)
    yy = tl.load(frame + 4, mask=inside, other=1.0)
    zx = tl.load(frame + 6, mask=inside, other=0.0)
    zy = tl.load(frame + 7, mask=inside, other=0.0)
    zz = tl.load(frame + 8, mask=inside, other=1.0)
    # The larger one is taken out of the root: a square of a small number may vanish.
    larger = tl.maximum(tl.abs(xy), tl.abs(zy))
    at_pole = larger == 0.0
    larger = tl.where(at_pole, 1.0, larger)
    sin_b = larger * tl.sqrt((xy / larger) * (xy / larger) + (zy / larger) * (zy / larger))
    divisor = tl.where(at_pole, 1.0, sin_b)
    sin_a = tl.where(at_pole, 0.0, xy / divisor)
    cos_a = tl.where(at_pole, 1.0, zy / divisor)
    cos_c = cos_a * xx - sin_a * zx
    sin_c = cos_a * xz - sin_a * zz
    order = tl.load(orders + entry, mask=known, other=0)
    column = tl.load(orders + PACKED + entry, mask=known, other=0)

    here = tl.zeros((E, P), dtype=tl.float32)  # d at (m, m'), (m, -m'), (-m, m') and (-m, -m')
    other_column = tl.zeros((E, P), dtype=tl.float32)
    other_row = tl.zeros((E, P), dtype=tl.float32)
    both = tl.zeros((E, P), dtype=tl.float32)
    cosine_a = tl.zeros((E, P), dtype=tl.float32)  # of m and m'
    sine_a = tl.zeros((E, P), dtype=tl.float32)
    cosine_c = tl.zeros((E, P), dtype=tl.float32)
    sine_c = tl.zeros((E, P), dtype=tl.float32)
    ca, sa = tl.full((E,), 1.0, dtype=tl.float32), tl.zeros((E,), dtype=tl.float32)  # of k times the angle
    cb, sb = tl.full((E,), 1.0, dtype=tl.float32), tl.zeros((E,), dtype=tl.float32)
    cc, sc = tl.full((E,), 1.0, dtype=tl.float32), tl.zeros((E,), dtype=tl.float32)
    for k in range(LMAX + 1):
        even = tables + k * PACKED + entry
        odd = even + (LMAX + 1) * PACKED
        here += cb[:, None] * tl.load(even, mask=known, other=0.0)[None, :]
        here += sb[:, None] * tl.load(odd, mask=known, other=0.0)[None, :]
        even += (2 * LMAX + 2) * PACKED
        odd += (2 * LMAX + 2) * PACKED
        other_column += cb[:, None] * tl.load(even, mask=known, other=0.0)[None, :]
        other_column += sb[:, None] * tl.load(odd, mask=known, other=0.0)[None, :]
        even += (2 * LMAX + 2) * PACKED
        odd += (2 * LMAX + 2) * PACKED
        other_row += cb[:, None] * tl.load(even, mask=known, other=0.0)[None, :]
        other_row += sb[:, None] * tl.load(odd, mask=known, other=0.0)[None, :]
        even += (2 * LMAX + 2) * PACKED
        odd += (2 * LMAX + 2) * PACKED
        both += cb[:, None] * tl.load(even, mask=known, other=0.0)[None, :]
        both += sb[:, None] * tl.load(odd, mask=known, other=0.0)[None, :]
        plus = tl.where(order == k, 1.0, 0.0)
        minus = tl.where(order == -k, 1.0, 0.0)
        cosine_a += ca[:, None] * tl.maximum(plus, minus)[None, :]
        sine_a += sa[:, None] * (plus - minus)[None, :]
        plus = tl.where(column == k, 1.0, 0.0)
        minus = tl.where(column == -k, 1.0, 0.0)
        cosine_c += cc[:, None] * tl.maximum(plus, minus)[None, :]
        sine_c += sc[:, None] * (plus - minus)[None, :]
        new_ca = ca * cos_a - sa * sin_a
        sa = sa * cos_a + ca * sin_a
        ca = new_ca
        new_cb = cb * yy - sb * sin_b
        sb = sb * yy + cb * sin_b
        cb = new_cb
        new_cc = cc * cos_c - sc * sin_c
        sc = sc * cos_c + cc * sin_c
        cc = new_cc
    result = (here * cosine_c + other_column * sine_c) * cosine_a
    result -= (other_row * cosine_c + both * sine_c) * sine_a
    where = edge.to(tl.int64)[:, None] * PACKED + entry[None, :]
    tl.store(out + where, result, mask=inside[:, None] & known[None, :])


@lru_cache(maxsize=64)
def _tables(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """(4, 2L+2, P), the coefficients of d at (±m, ±m'); (2, P) int32, m and m'."""
    table = plain._table(rows, device, torch.float32)
    other_row, other_column = plain._mirrored(rows, device)
    tables = [table, table[:, other_column], table[:, other_row], table[:, other_row][:, other_column]]
    return torch.stack(tables), torch.stack(plain._orders(rows, device)).int()


def wigner_packed(frames: Tensor, rows: Rows) -> Tensor:
    """Return the kept rows of the rotations into the frames of edges, their blocks one after the other.

    Args:
        frames: (E, 3, 3), rotations that turn each edge onto the y axis; rows are the new axes.
        rows: what is kept.

    Returns:
        (E, P) in the order of `Rows.blocks`, in single precision and without gradient.
    """
    frames = frames.detach().contiguous()
    tables, orders = _tables(rows, frames.device)
    out = frames.new_empty(len(frames), rows.num_packed)
    launch(
        _forward, (blocks(len(frames), _EDGES), blocks(rows.num_packed, _ENTRIES)), frames, frames, tables,
        orders, out, len(frames), LMAX=rows.lmax, PACKED=rows.num_packed, E=_EDGES, P=_ENTRIES, num_warps=2,
    )  # fmt: skip
    return out
