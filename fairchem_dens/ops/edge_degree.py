"""What a node starts with from its edges: their harmonics, weighted by distance and elements.

    out[n, (l, m)] = Σ_e Y_lm(e) · rescale_l · radial[e, l]

In the frame of an edge only m = 0 would be filled and rotated back; what comes out is a spherical
harmonic of the edge itself.

Source: arXiv 2306.11517, section 3.3 (edge-degree embedding).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairchem_dens.ops.chunks import add_rows, portions
from fairchem_dens.ops.layout import Edges, Rows
from fairchem_dens.ops.precision import at_least_single
from fairchem_dens.ops.wigner import zonal


def edge_degree(radial: Tensor, wigner: Tensor, edges: Edges, rows: Rows) -> Tensor:
    """Sum the weighted harmonics of the edges into each node; with a gradient to ``radial``.

    Args:
        radial: (E, L+1, C).
        wigner: (E, P), packed rotations, whose rows m = 0 are the harmonics.
        edges: into N nodes.
        rows: what is kept.

    Returns:
        (N, (L+1)², C), in single precision or better.
    """
    return _EdgeDegree.apply(radial, wigner, edges, rows)


class _EdgeDegree(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, radial: Tensor, wigner: Tensor, edges: Edges, rows: Rows) -> Tensor:
        with torch.autocast(radial.device.type, enabled=False):
            radial = at_least_single(radial)
            expand = _expand(rows, radial.device, radial.dtype)
            harmonics = zonal(wigner, rows).to(radial.dtype)
            out = radial.new_zeros(edges.num_nodes, rows.num_full, radial.shape[2])
            for part in portions(len(edges), _bytes(radial, rows), radial.device):
                weighted = harmonics[part, :, None] * expand  # (E, (L+1)², L+1), one entry in a row
                add_rows(out, edges.target[part], torch.bmm(weighted, radial[part]))
        ctx.save_for_backward(harmonics)
        ctx.edges, ctx.rows = edges, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (harmonics,) = ctx.saved_tensors
        edges, rows = ctx.edges, ctx.rows
        with torch.autocast(grad.device.type, enabled=False):
            expand = _expand(rows, grad.device, grad.dtype)
            grad_radial = grad.new_empty(len(edges), rows.lmax + 1, grad.shape[2])
            for part in portions(len(edges), _bytes(grad, rows), grad.device):
                weighted = harmonics[part, :, None] * expand
                of_target = grad.index_select(0, edges.target[part])
                torch.bmm(weighted.transpose(1, 2), of_target, out=grad_radial[part])
        return grad_radial, None, None, None


def _bytes(x: Tensor, rows: Rows) -> int:
    return x.element_size() * 2 * x.shape[2] * rows.num_full


@lru_cache(maxsize=64)
def _expand(rows: Rows, device: torch.device, dtype: torch.dtype) -> Tensor:
    """((L+1)², L+1): the rescaling of a row's degree in the column of that degree."""
    table = torch.zeros(rows.num_full, rows.lmax + 1, dtype=torch.float64)
    for degree, factor in enumerate(rows.rescale):
        table[degree**2 : (degree + 1) ** 2, degree] = factor
    return table.to(device, dtype)
