"""Kernels over edges agree with their plain twins, whatever the edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fairchem_dens.ops import attend as plain_attend
from fairchem_dens.ops import edge_degree as plain_degree
from fairchem_dens.ops import rotate as plain_rotate
from fairchem_dens.ops import s2_activation as plain_s2
from fairchem_dens.ops.fused import attend as fused_attend
from fairchem_dens.ops.fused import edge_degree as fused_degree
from fairchem_dens.ops.fused import rotate as fused_rotate
from fairchem_dens.ops.fused import s2_activation as fused_s2
from fairchem_dens.ops.layout import Edges, Rows, edges_from
from fused import FORWARD, check, edges_of, largest, run

GRAPHS = {
    "one edge": (1, 0),
    "no edge": (0, 0, 0),
    "an isolated node": (2, 0, 3),
    "one neighbour each": (1, 1, 1),
}


def rotation_inputs(edges: Edges, rows: Rows, channels: int) -> list[Tensor]:
    return [
        torch.randn(edges.num_nodes, rows.num_full, channels, requires_grad=True),
        torch.randn(len(edges), rows.num_packed),
        torch.randn(len(edges), rows.num_radial, 2 * channels, requires_grad=True),
    ]


def attention_inputs(edges: Edges, rows: Rows, heads: int, width: int) -> list[Tensor]:
    return [
        torch.randn(len(edges), rows.num_kept, heads * width, requires_grad=True),
        (2 * torch.randn(len(edges), heads)).requires_grad_(),
        torch.randn(len(edges), rows.num_packed),
    ]


def rotation(module, edges: Edges, rows: Rows):
    return lambda x, wigner, scale: module.rotate(x, edges, wigner, scale, rows)


def attention(module, edges: Edges, rows: Rows, dropout: Tensor | None = None):
    def operation(values: Tensor, logits: Tensor, wigner: Tensor) -> Tensor:
        factors = None if dropout is None else dropout.to(values)
        return module.attend(values, logits, wigner, edges, rows, factors)

    return operation


@pytest.mark.parametrize("degrees", GRAPHS.values(), ids=GRAPHS)
def test_rotate(degrees: tuple[int, ...], device: str) -> None:
    edges, rows = edges_of(*degrees, device=device), Rows(2, 1)
    inputs = rotation_inputs(edges, rows, 5)
    check(rotation(fused_rotate, edges, rows), rotation(plain_rotate, edges, rows), inputs, device)


@pytest.mark.parametrize("degrees", GRAPHS.values(), ids=GRAPHS)
def test_attend(degrees: tuple[int, ...], device: str) -> None:
    edges, rows = edges_of(*degrees, device=device), Rows(2, 1)
    inputs = attention_inputs(edges, rows, 3, 4)
    check(attention(fused_attend, edges, rows), attention(plain_attend, edges, rows), inputs, device)


# Four layouts of degrees and orders; more channels than a program has.
@pytest.mark.parametrize(
    ("lmax", "mmax", "channels"),
    [
        pytest.param(6, 2, 3, marks=pytest.mark.slow),
        pytest.param(4, 3, 2, marks=pytest.mark.slow),
        (1, 0, 66),
        (3, 3, 1),
    ],
    ids=str,
)
def test_degrees_and_orders(lmax: int, mmax: int, channels: int, device: str) -> None:
    edges, rows = edges_of(2, 0, 1, device=device), Rows(lmax, mmax)
    inputs = rotation_inputs(edges, rows, channels)
    check(rotation(fused_rotate, edges, rows), rotation(plain_rotate, edges, rows), inputs, device)
    inputs = attention_inputs(edges, rows, channels, 2)
    check(attention(fused_attend, edges, rows), attention(plain_attend, edges, rows), inputs, device)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [(200, 1), (40, 1, 0)], ids=str)
def test_many_neighbours(degrees: tuple[int, ...], device: str) -> None:
    """More than the softmax looks at together."""
    edges, rows = edges_of(*degrees, device=device), Rows(2, 2)
    inputs = rotation_inputs(edges, rows, 4)
    check(rotation(fused_rotate, edges, rows), rotation(plain_rotate, edges, rows), inputs, device)
    inputs = attention_inputs(edges, rows, 2, 4)
    check(attention(fused_attend, edges, rows), attention(plain_attend, edges, rows), inputs, device)


# One, not a power of two, the paper's number, and more than the softmax looks at together.
@pytest.mark.parametrize(
    "each", [1, 3, *(pytest.param(number, marks=pytest.mark.slow) for number in (20, 33))]
)
@pytest.mark.parametrize("name", ["rotate", "attend", "edge_degree"])
def test_as_many_edges_into_each_node(name: str, each: int, device: str) -> None:
    """That the number is known changes nothing; without a bound it is not known."""
    target = torch.arange(2, device=device).repeat_interleave(each)
    source, rows = torch.randint_like(target, 2), Rows(1, 1)
    known, unknown = edges_from(source, target, 2, at_most=each), edges_from(source, target, 2)
    assert known.in_degree == each and unknown.in_degree is None
    assert torch.equal(known.row_ptr, unknown.row_ptr)
    dropout = torch.randint(2, (len(known), 3), device=device).float()

    def operation(path: str, edges: Edges) -> Callable[..., Tensor]:
        fused = path == "fused"
        if name == "rotate":
            return rotation(fused_rotate if fused else plain_rotate, edges, rows)
        if name == "attend":
            return attention(fused_attend if fused else plain_attend, edges, rows, dropout)
        module: Any = fused_degree if fused else plain_degree
        return lambda radial, wigner: module.edge_degree(radial, wigner, edges, rows)

    inputs = {
        "rotate": lambda: rotation_inputs(known, rows, 5),
        "attend": lambda: attention_inputs(known, rows, 3, 4),
        "edge_degree": lambda: [torch.randn(2 * each, 2, 5).requires_grad_(), torch.randn(2 * each, 10)],
    }[name]()
    check(operation("fused", known), operation("plain", known), inputs, device)
    found, expected = (
        run(operation("fused", edges), inputs, torch.float32, device) for edges in (known, unknown)
    )
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        # A compiler may order the sums of two kernels differently, the interpreter does not.
        assert largest(one, other) <= (0 if device == "cpu" else FORWARD)
    found, expected = (
        run(operation("plain", edges), inputs, torch.float64, device) for edges in (known, unknown)
    )
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_wide_heads(device: str) -> None:
    """Of more channels than a program has else."""
    edges, rows = edges_of(2, 1, device=device), Rows(1, 1)
    inputs = attention_inputs(edges, rows, 2, 128)
    check(attention(fused_attend, edges, rows), attention(plain_attend, edges, rows), inputs, device)


def test_dropout(device: str) -> None:
    edges, rows = edges_of(4, 1, 2, device=device), Rows(2, 1)
    dropout = 2 * torch.randint(2, (len(edges), 3)).float()
    operations = [attention(module, edges, rows, dropout) for module in (fused_attend, plain_attend)]
    check(*operations, attention_inputs(edges, rows, 3, 4), device)


@pytest.mark.parametrize("degrees", [(3, 2, 4), (3, 3, 3)], ids=str)
def test_rotate_in_portions(degrees: tuple[int, ...], device: str) -> None:
    """The gradient of edges 2..5 alone, added to what there is."""
    edges, rows = edges_of(*degrees, device=device), Rows(2, 1)
    if len(set(degrees)) == 1:
        edges = replace(edges, in_degree=degrees[0])
    x, wigner, scale = (value.detach().to(device) for value in rotation_inputs(edges, rows, 5))
    part = slice(2, 6)
    grad = torch.randn(4, rows.num_kept, 10, device=device)
    results = []
    for module in (fused_rotate, plain_rotate):
        grad_x = torch.ones_like(x)
        grad_scale = module.rotate_backward(grad, x, edges, wigner[part], scale[part], rows, grad_x, part)
        results.append((grad_x, grad_scale))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# As many columns as a program has, more, and fewer; grids of one piece and of several.
@pytest.mark.parametrize(
    ("edges", "rows", "rows_out", "points", "gated"),
    [(1, 29, 29, 40, True), (3, 9, 4, 32, True), (0, 4, 4, 18, True), (7, 17, 17, 18, False)],
    ids=["one edge", "fewer rows", "no edge", "no gate"],
)
def test_s2_activation(edges: int, rows: int, rows_out: int, points: int, gated: bool, device: str) -> None:
    tables = [torch.randn(points, rows), torch.randn(points, rows_out)]
    x = torch.randn(edges, rows, 22, requires_grad=True)
    gate = torch.randn(edges, 22, requires_grad=True) if gated else None
    check(fused_s2.s2_activation, plain_s2.s2_activation, [x, gate, *tables], device)
