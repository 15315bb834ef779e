"""Rotations of spherical tensors into the frame of an edge, in closed form.

With y as the polar axis, a rotation is R = R_y(α) R_x(β) R_y(γ), and so is what it does to harmonics of
degree l:

    D(R) = X(α) d(β) X(γ),    d(β) = Σ_k C_k cos kβ + S_k sin kβ,  k = 0..l.

X has cos mα on its diagonal and -sin mα, for row m, on the other one. The C_k and S_k are the projectors
on the eigenspaces of the generator of rotations about x: constants, of which only the kept rows are
needed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fairchem_dens.ops.layout import Rows, constant


def wigner_packed(frames: Tensor, rows: Rows) -> Tensor:
    """Return the kept rows of the rotations into the frames of edges, their blocks one after the other.

    Args:
        frames: (E, 3, 3), rotations that turn each edge onto the y axis; rows are the new axes.
        rows: what is kept.

    Returns:
        (E, P) in the order of `Rows.blocks`, of the type of ``frames`` and without gradient.
    """
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        # R = R_y(α) R_x(β) R_y(γ) from sines and cosines alone: angles would lose digits near the poles.
        sin_b, cos_b = torch.hypot(frames[:, 0, 1], frames[:, 2, 1]), frames[:, 1, 1]
        at_pole = sin_b == 0
        divisor = torch.where(at_pole, torch.ones_like(sin_b), sin_b)
        sin_a = torch.where(at_pole, torch.zeros_like(sin_b), frames[:, 0, 1] / divisor)
        cos_a = torch.where(at_pole, torch.ones_like(sin_b), frames[:, 2, 1] / divisor)
        # The first row of what is left after α (β does not touch it) is (cos γ, 0, sin γ).
        cos_c = cos_a * frames[:, 0, 0] - sin_a * frames[:, 2, 0]
        sin_c = cos_a * frames[:, 0, 2] - sin_a * frames[:, 2, 2]
        cosines_a, sines_a = _multiples(cos_a, sin_a, rows.mmax)
        cosines_b, sines_b = _multiples(cos_b, sin_b, rows.lmax)
        cosines_c, sines_c = _multiples(cos_c, sin_c, rows.lmax)

        device, dtype = frames.device, frames.dtype
        table, row, column = _table(rows, device, dtype), *_orders(rows, device)
        other_row, other_column = _mirrored(rows, device)
        d = torch.cat([cosines_b, sines_b], dim=1) @ table
        d = d * cosines_c[:, column.abs()] + d[:, other_column] * _signed(sines_c, column)
        return d * cosines_a[:, row.abs()] - d[:, other_row] * _signed(sines_a, row)


def dense_rotations(wigner: Tensor, rows: Rows, *, rescaled: bool = False) -> Tensor:
    """Spread packed rotations out to matrices, rows in the order of `Rows`.

    Args:
        wigner: (E, P).
        rows: what is kept.
        rescaled: make up for the orders that were left out, see `Rows.rescale`.

    Returns:
        (E, R, (L+1)²), zero between different degrees.
    """
    if rescaled:
        factors = tuple(rows.rescale[degree] for degree in rows.packed_degrees)
        wigner = wigner * constant(factors, wigner.device, wigner.dtype)
    padded = torch.cat([wigner, wigner.new_zeros(len(wigner), 1)], dim=1)
    return padded[:, _spread(rows, wigner.device)].view(len(wigner), rows.num_kept, rows.num_full)


def zonal(wigner: Tensor, rows: Rows) -> Tensor:
    """Return the rows m = 0 of packed rotations.

    These are the spherical harmonics of the edge, in the normalisation in which they have norm 1 for each
    degree; the roll of the frame does not enter.

    Args:
        wigner: (E, P).
        rows: what is kept.

    Returns:
        (E, (L+1)²).
    """
    return wigner[:, _zonal(rows, wigner.device)]


def _multiples(cosine: Tensor, sine: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 0..highest times an angle, (E, highest + 1) each."""
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for _ in range(highest):
        c, s = cosines[-1], sines[-1]
        cosines.append(c * cosine - s * sine)
        sines.append(s * cosine + c * sine)
    return torch.stack(cosines, dim=1), torch.stack(sines, dim=1)


def _signed(sines: Tensor, order: Tensor) -> Tensor:
    return sines[:, order.abs()] * order.sign().to(sines.dtype)


def _generator(degree: int) -> np.ndarray:
    """Generator of rotations about x for real harmonics, polar axis y, orders -l..l; it is antisymmetric."""
    m = np.arange(-degree, degree)
    steps = np.sqrt(degree * (degree + 1) - m * (m + 1)) / 2
    # Angular momentum about the first axis between states of definite order: half the sum of its ladders.
    ladder = (np.diag(steps, 1) - np.diag(steps, -1)).astype(complex)
    # Real harmonics in terms of those states.
    basis = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=complex)
    basis[degree, degree] = 1
    for order in range(1, degree + 1):
        up, down, sign = degree + order, degree - order, (-1) ** order
        basis[down, up], basis[down, down] = 2**-0.5, -1j * 2**-0.5
        basis[up, up], basis[up, down] = sign * 2**-0.5, 1j * sign * 2**-0.5
    return np.real(basis.conj().T @ ladder @ basis)


@lru_cache(maxsize=16)
def _coefficients(rows: Rows) -> np.ndarray:
    """(2L+2, P): cosines of 0..L times β, then sines, to d(β)."""
    parts = []
    for degree, (_, kept, _) in enumerate(rows.blocks):
        values, vectors = np.linalg.eigh(1j * _generator(degree))  # -degree..degree
        table = np.zeros((2, rows.lmax + 1, 2 * degree + 1, 2 * degree + 1))
        for k, vector in zip(np.rint(values).astype(int), vectors.T, strict=True):
            projector = np.outer(vector, vector.conj())  # times exp(-ikβ)
            table[0, abs(k)] += projector.real
            table[1, abs(k)] += np.sign(k) * projector.imag
        middle = slice(degree - kept // 2, degree + kept // 2 + 1)
        parts.append(table[:, :, middle].reshape(2 * (rows.lmax + 1), -1))
    table = np.concatenate(parts, axis=1)
    table[np.abs(table) < 1e-14] = 0
    return table


@lru_cache(maxsize=64)
def _table(rows: Rows, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_coefficients(rows), device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _orders(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.tensor(rows.packed_orders, device=device).T.contiguous()
    return row, column


@lru_cache(maxsize=64)
def _mirrored(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each packed entry (m, m'), where (-m, m') and (m, -m') are."""
    names = list(zip(rows.packed_degrees, rows.packed_orders, strict=True))
    where = {(degree, *orders): place for place, (degree, orders) in enumerate(names)}
    other_row = [where[degree, -m, column] for degree, (m, column) in names]
    other_column = [where[degree, m, -column] for degree, (m, column) in names]
    return torch.tensor(other_row, device=device), torch.tensor(other_column, device=device)


@lru_cache(maxsize=64)
def _spread(rows: Rows, device: torch.device) -> Tensor:
    """(R (L+1)²,): which packed entry each entry of the matrices is; P, one past the end, for zeros."""
    index = torch.full((rows.num_kept, rows.num_full), rows.num_packed)
    for degree, (start, kept, columns) in enumerate(rows.blocks):
        block = torch.arange(start, start + kept * columns).view(kept, columns)
        index[list(rows.places[degree]), degree**2 : (degree + 1) ** 2] = block
    return index.flatten().to(device)


@lru_cache(maxsize=64)
def _zonal(rows: Rows, device: torch.device) -> Tensor:
    return torch.cat(
        [start + kept // 2 * columns + torch.arange(columns) for start, kept, columns in rows.blocks]
    ).to(device)
