"""The tensor product as one operation, and reading pairs of atoms: values and derivatives of all orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fairchem_dens.models.equiformer.graph import find_neighbors
from fairchem_dens.ops import trilinear as module
from fairchem_dens.ops.gather import gather
from fairchem_dens.ops.trilinear import Layout, trilinear, trilinear_plain

DIMS = (1, 3, 2)
LAYOUT = Layout.of((3, 2, 1), (1, 3), [[1, 1], [1, 2], [0, 1]])
EDGES = 3


@pytest.fixture(params=[128, 2], ids=["one piece", "pieces"])
def _pieces(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


def inputs(weighted: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(dim, channels) for dim, channels in zip(DIMS, LAYOUT.channels, strict=True)]
    shapes += [(rows, dim) for rows, dim in zip(LAYOUT.rows, DIMS, strict=True)]
    shapes += [(LAYOUT.weight_numel,)] if weighted else []
    return [torch.randn(EDGES, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def coupled(function, values: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(function(values[:3], values[3:6], values[6] if len(values) > 6 else None, LAYOUT))


def test_layout_counts_rows_and_channels():
    assert LAYOUT.rows == (4, 7, 3) and LAYOUT.widths == (5, 8) and LAYOUT.weight_numel == 13
    assert [(block.row, block.channel) for block in LAYOUT.blocks] == [(0, 0), (1, 0), (0, 3), (1, 3), (0, 7)]


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("weighted", [True, False])
class TestTrilinear:
    def test_is_what_is_written(self, weighted):
        """The sum of the module's docstring, term by term."""
        values = inputs(weighted)
        found = coupled(trilinear, values)
        for block in LAYOUT.blocks:
            x, matrix = values[block.source], values[3 + block.source]
            components, channels = LAYOUT.components[block.target], LAYOUT.channels[block.source]
            for path in range(block.paths):
                start = block.row + path * components
                expected = torch.einsum("ekd,edc->ekc", matrix[:, start : start + components], x)
                place = block.channel + path * channels
                if weighted:
                    first = sum(LAYOUT.widths[: block.target]) + place
                    expected = expected * values[6][:, None, first : first + channels]
                part = found[block.target][..., place : place + channels]
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-14)

    def test_first_and_second_derivatives(self, weighted):
        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return coupled(trilinear, values)

        values = inputs(weighted)
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)

    def test_third_derivative(self, weighted):
        """The second derivative may be differentiated again, as if torch had taken it step by step."""

        def third(function) -> tuple[Tensor, ...]:
            values = inputs(weighted)
            total = sum(one.sin().sum() for one in coupled(function, values))
            for _ in range(2):
                gradients = torch.autograd.grad(total, values, create_graph=True)
                total = sum(one.sin().sum() for one in gradients)
            return torch.autograd.grad(total, values)

        for found, expected in zip(third(trilinear), third(trilinear_plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_matrices_once(self, weighted):
        """As in training: a recorded pass for the matrices, then one for all else."""

        def gradients(once: bool) -> tuple[Tensor, ...]:
            values = inputs(weighted)
            weights = values[6] if weighted else None
            outputs = trilinear(values[:3], values[3:6], weights, LAYOUT, once)
            slopes = torch.autograd.grad(
                sum(one.sin().sum() for one in outputs), values[3:6], create_graph=True
            )
            others = [*values[:3], *values[6:]]
            total = sum(one.square().sum() for one in [*slopes, *outputs])
            by_others = torch.autograd.grad(total, others, retain_graph=True)
            (dropped,) = torch.autograd.grad(total, values[3], allow_unused=True)
            assert (dropped is None or not dropped.any()) == once
            return *slopes, *by_others

        for found, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_only_some_inputs_are_differentiated(self, weighted):
        """As with frozen weights, or where positions alone matter."""
        for chosen in range(len(inputs(weighted))):
            values = inputs(weighted)
            for place, value in enumerate(values):
                value.requires_grad_(place == chosen)

            def slope(function, values: list[Tensor] = values, chosen: int = chosen) -> Tensor:
                total = sum(one.square().sum() for one in coupled(function, values))
                (gradient,) = torch.autograd.grad(total, values[chosen], create_graph=True)
                return torch.autograd.grad(gradient.square().sum(), values[chosen])[0]

            torch.testing.assert_close(slope(trilinear), slope(trilinear_plain))


def test_mixed_precision_does_not_round_the_product():
    values = [value.detach().float() for value in inputs(True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = coupled(trilinear, values)
    for found, expected in zip(mixed, coupled(trilinear, values), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [False, True])
def test_gather(monkeypatch, cut):
    """Values as indexing gives them, gradients as torch takes them, twice."""
    if cut:
        monkeypatch.setattr("fairchem_dens.models.equiformer.graph.COMPLETE_UP_TO", 2)
    torch.manual_seed(0)
    natoms = torch.tensor([4, 1, 6, 2])
    batch = torch.repeat_interleave(torch.arange(4), natoms)
    pos = torch.randn(13, 3, dtype=torch.float64)
    neighbors = find_neighbors(pos, natoms, batch, cutoff=1.5)
    index, reverse = neighbors.index, neighbors.reverse
    assert (reverse[reverse] == torch.arange(reverse.numel())).all()
    targets = torch.arange(13)[:, None].expand_as(index).reshape(-1)
    assert (index.reshape(-1)[reverse] == targets).all()

    x = torch.randn(13, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather(x, index, reverse), x[index.reshape(-1)])
    assert torch.autograd.gradcheck(lambda one: gather(one, index, reverse), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda one: gather(one, index, reverse), x, fast_mode=True)
