"""Kernels over nodes agree with their plain twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fairchem_dens.ops import edge_degree as plain_degree
from fairchem_dens.ops import grid_ffn as plain_ffn
from fairchem_dens.ops import norm as plain_norm
from fairchem_dens.ops import wigner as plain_wigner
from fairchem_dens.ops.fused import edge_degree as fused_degree
from fairchem_dens.ops.fused import grid_ffn as fused_ffn
from fairchem_dens.ops.fused import norm as fused_norm
from fairchem_dens.ops.fused import wigner as fused_wigner
from fairchem_dens.ops.layout import Rows
from fused import check, edges_of


@pytest.mark.parametrize("kind", sorted(fused_norm.SPLIT))
@pytest.mark.parametrize(
    ("nodes", "lmax", "channels"), [(3, 2, 5), (1, 6, 16), (0, 1, 4), (7, 1, 3)], ids=str
)
def test_norm(
    kind: str, nodes: int, lmax: int, channels: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_norm, "_PROGRAMS", 4)  # of which some take two nodes
    inputs = [
        torch.randn(nodes, (lmax + 1) ** 2, channels, requires_grad=True),
        torch.randn(lmax + 1, channels, requires_grad=True),
        torch.randn(channels, requires_grad=True),
    ]

    def operation(module):
        return lambda x, weight, bias: module.equivariant_norm(x, weight, bias, 1e-5, kind)

    check(operation(fused_norm), operation(plain_norm), inputs, device)


# One row less than goes in, as for the energy; grids of one piece and of several.
@pytest.mark.parametrize(
    ("nodes", "rows", "rows_out", "points"),
    [(2, 9, 9, 40), (1, 4, 3, 32), (0, 4, 4, 18), (3, 17, 16, 70)],
    ids=str,
)
def test_grid_mlp(nodes: int, rows: int, rows_out: int, points: int, device: str) -> None:
    inputs = [
        torch.randn(nodes, rows, 16, requires_grad=True),
        (torch.randn(16, 16) / 4).requires_grad_(),
        torch.randn(points, rows),
        torch.randn(points, rows_out),
    ]
    check(fused_ffn.grid_mlp, plain_ffn.grid_mlp, inputs, device)


@pytest.mark.parametrize(("degrees", "lmax"), [((2, 0, 3), 2), ((0, 0), 1), ((1,), 6)], ids=str)
def test_edge_degree(degrees: tuple[int, ...], lmax: int, device: str) -> None:
    edges, rows = edges_of(*degrees, device=device), Rows(lmax, min(lmax, 2))

    def operation(module):
        return lambda radial, wigner: module.edge_degree(radial, wigner, edges, rows)

    inputs = [
        torch.randn(len(edges), lmax + 1, 5, requires_grad=True),
        torch.randn(len(edges), rows.num_packed),
    ]
    check(operation(fused_degree), operation(plain_degree), inputs, device)


def frames(number: int) -> Tensor:
    """Rotations, the first ones with the edge on the pole, beyond it and close to it."""
    matrices = torch.linalg.qr(torch.randn(number, 3, 3, dtype=torch.float64))[0]
    matrices = matrices * torch.linalg.det(matrices)[:, None, None]
    if number > 2:
        cosine, sine = torch.cos(torch.tensor(0.3)), torch.sin(torch.tensor(0.3))
        matrices[0] = torch.tensor([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        matrices[1] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
        tilt = 1e-4
        near = torch.tensor([[1, 0, 0], [0, 1, -tilt], [0, tilt, 1]], dtype=torch.float64)
        matrices[2] = matrices[0] @ torch.linalg.qr(near)[0]
        matrices[2] *= torch.linalg.det(matrices[2])
    return matrices


@pytest.mark.parametrize(("number", "lmax", "mmax"), [(7, 6, 2), (1, 3, 3), (0, 2, 1)], ids=str)
def test_wigner(number: int, lmax: int, mmax: int, device: str) -> None:
    rows = Rows(lmax, mmax)
    given = frames(number).float().to(device)
    exact = plain_wigner.wigner_packed(given.double(), rows)
    found = fused_wigner.wigner_packed(given, rows)
    plain = plain_wigner.wigner_packed(given, rows)
    assert found.shape == exact.shape
    if number:
        wrong, twin = ((one.double() - exact).abs().max() for one in (found, plain))
        assert wrong <= max(2 * twin, 2e-6)
