"""The operations of EquiformerV2 by themselves: layout, rotations, gradients, odd graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from e3nn import o3
from fairchem.core.models.equiformer_v2.so3 import CoefficientMappingModule, SO3_Rotation
from torch import Tensor

from fairchem_dens.models.graph import edge_frames
from fairchem_dens.ops import chunks
from fairchem_dens.ops.attend import attend, edge_weights, sum_over_edges
from fairchem_dens.ops.edge_degree import edge_degree
from fairchem_dens.ops.grid_ffn import grid_mlp
from fairchem_dens.ops.layout import Edges, Rows, edges_from
from fairchem_dens.ops.norm import KINDS, equivariant_norm
from fairchem_dens.ops.rotate import rotate
from fairchem_dens.ops.s2_activation import s2_activation
from fairchem_dens.ops.so2 import RadialTail, convolve, rotate_and_convolve
from fairchem_dens.ops.wigner import dense_rotations, wigner_packed, zonal
from fairchem_dens.ops.zero_gradients import with_zero_gradients
from precision import default_precision

ROWS = Rows(2, 1)
DEGREES = [(1, 0), (2, 2), (3, 1), (6, 2), (6, 3), (11, 4)]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with default_precision(torch.float64):
        yield


def make_edges(counts: list[int]) -> Edges:
    """Nodes with so many edges each, from nodes at random."""
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return edges_from(torch.randint(len(counts), (len(target),)), target, len(counts))


GRAPHS = {"of all kinds": [2, 0, 3, 1], "one edge": [0, 1], "no edge": [0, 0]}
every_graph = pytest.mark.parametrize("counts", GRAPHS.values(), ids=GRAPHS)


def frames(count: int) -> Tensor:
    return edge_frames(torch.randn(count, 3), random_roll=True)


def learned(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


class TestLayout:
    @pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
    def test_order_of_rows_is_fairchems(self, lmax, mmax):
        rows = Rows(lmax, mmax)
        mapping = CoefficientMappingModule([lmax], [mmax])
        by_order = mapping.to_m.argmax(dim=1)
        assert rows.degrees == tuple(mapping.l_harmonic[by_order].tolist())
        assert rows.orders == tuple(mapping.m_complex[by_order].tolist())

    def test_numbers_of_the_papers_model(self):
        rows = Rows(6, 2)
        sizes = (rows.num_full, rows.num_kept, rows.num_radial, rows.num_packed)
        assert sizes == (49, 29, 18, 235) and rows.sizes == (7, 12, 10)

    def test_orders_beyond_the_degree_are_refused(self):
        with pytest.raises(ValueError, match=r"between 0 and lmax \(2\), found 3"):
            Rows(2, 3)

    def test_both_ways_through_the_edges(self):
        edges = make_edges([2, 0, 3, 1])
        for node in range(4):
            into = slice(*edges.row_ptr[node : node + 2].tolist())
            out_of = edges.by_source[slice(*edges.source_ptr[node : node + 2].tolist())]
            assert (edges.target[into] == node).all() and (edges.source[out_of] == node).all()
        assert edges.row_ptr[-1] == edges.source_ptr[-1] == 6

    def test_as_many_edges_into_each_node(self):
        source, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
        edges = edges_from(source, target, 2, at_most=2)
        assert edges.in_degree == 2 and edges.row_ptr.tolist() == [0, 2, 4]
        assert edges_from(source, target, 2).in_degree is None
        assert edges_from(source[1:], target[1:], 2, at_most=2).in_degree is None
        assert edges_from(source[:0], target[:0], 2, at_most=2).in_degree is None


class TestRotations:
    @pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
    def test_kept_rows_are_fairchems(self, lmax, mmax):
        rows, rotation = Rows(lmax, mmax), SO3_Rotation(lmax)
        matrices = frames(20)
        rotation.set_wigner(matrices)
        found = dense_rotations(wigner_packed(matrices, rows), rows)
        expected = rotation.wigner[:, list(rows.full_rows)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * lmax)

    def test_edges_along_and_near_the_poles(self):
        """Where angles lose digits: the rotations of a vector are those of the matrix itself."""
        vectors = torch.tensor(
            [[0, 1.0, 0], [0, -1, 0], [1e-9, 1, 0], [1e-6, -1, 1e-7], [0, 0, 1], [1, 0, 0]]
        )
        matrices = edge_frames(vectors, random_roll=True)
        rows = Rows(1, 1)
        found = dense_rotations(wigner_packed(matrices, rows), rows)
        expected = matrices[:, [row - 1 for row in rows.full_rows[:2] + rows.full_rows[2:] if row]]
        torch.testing.assert_close(found[:, 1:, 1:], expected, rtol=0, atol=1e-15)

    def test_single_precision_is_orthogonal_and_close(self):
        matrices, rows = frames(200), Rows(6, 6)
        single = dense_rotations(wigner_packed(matrices.float(), rows), rows).double()
        double = dense_rotations(wigner_packed(matrices, rows), rows)
        identity = torch.eye(49).expand(200, 49, 49)
        torch.testing.assert_close(single @ single.transpose(1, 2), identity, rtol=0, atol=5e-6)
        torch.testing.assert_close(single, double, rtol=0, atol=5e-6)

    @pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
    def test_rows_of_order_zero_are_spherical_harmonics(self, lmax, mmax):
        vectors, rows = torch.randn(20, 3), Rows(lmax, mmax)
        packed = wigner_packed(edge_frames(vectors, random_roll=True), rows)
        expected = o3.spherical_harmonics(list(range(lmax + 1)), vectors, True, "norm")
        torch.testing.assert_close(zonal(packed, rows), expected, rtol=0, atol=1e-13 * lmax)

    def test_rescaling(self):
        packed, rows = wigner_packed(frames(3), Rows(3, 1)), Rows(3, 1)
        factors = torch.tensor([rows.rescale[degree] for degree in rows.degrees])[:, None]
        expected = dense_rotations(packed, rows) * factors
        torch.testing.assert_close(dense_rotations(packed, rows, rescaled=True), expected)


class TestGradients:
    @every_graph
    def test_of_rotation(self, counts):
        edges = make_edges(counts)
        wigner = wigner_packed(frames(len(edges)), ROWS)
        scale = learned(len(edges), ROWS.num_radial, 4)
        assert torch.autograd.gradcheck(
            lambda x, scale: rotate(x, edges, wigner, scale, ROWS), (learned(len(counts), 9, 2), scale)
        )

    @every_graph
    def test_of_attention(self, counts):
        edges = make_edges(counts)
        wigner, dropout = wigner_packed(frames(len(edges)), ROWS), torch.rand(len(edges), 2).round() * 2
        for factors in (None, dropout):
            assert torch.autograd.gradcheck(
                lambda values, logits, factors=factors: attend(values, logits, wigner, edges, ROWS, factors),
                (learned(len(edges), ROWS.num_kept, 4), learned(len(edges), 2)),
            )

    @every_graph
    def test_of_sums_and_weights(self, counts):
        edges = make_edges(counts)
        assert torch.autograd.gradcheck(lambda x: edge_weights(x, edges), learned(len(edges), 2))
        assert torch.autograd.gradcheck(lambda x: sum_over_edges(x, edges), learned(len(edges), 2))
        wigner = wigner_packed(frames(len(edges)), ROWS)
        radial = learned(len(edges), 3, 2)
        assert torch.autograd.gradcheck(lambda x: edge_degree(x, wigner, edges, ROWS), radial)

    @pytest.mark.parametrize("gated", [True, False])
    def test_of_the_s2_activation(self, gated):
        to_grid, from_grid = torch.randn(10, 5), torch.randn(10, 4)
        inputs = (learned(3, 5, 2), learned(3, 2)) if gated else (learned(3, 5, 2),)
        assert torch.autograd.gradcheck(
            lambda x, gate=None: s2_activation(x, gate, to_grid, from_grid), inputs
        )

    def test_of_the_grid_network(self):
        to_grid, from_grid = torch.randn(10, 5), torch.randn(10, 4)
        inputs = learned(3, 5, 2), learned(2, 2)
        assert torch.autograd.gradcheck(lambda x, weight: grid_mlp(x, weight, to_grid, from_grid), inputs)

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_norms(self, kind):
        inputs = learned(3, 9, 4), learned(3, 4), learned(4)
        assert torch.autograd.gradcheck(
            lambda x, weight, bias: equivariant_norm(x, weight, bias, 1e-5, kind), inputs
        )


class TestPortions:
    @pytest.fixture(params=[1, 2**40], ids=["one at a time", "all at once"])
    def _portion(self, request, monkeypatch):
        monkeypatch.setattr(chunks, "CACHE_BYTES", request.param)

    @pytest.mark.usefixtures("_portion")
    @every_graph
    def test_convolution_is_rotation_and_matrix_products(self, counts, monkeypatch):
        monkeypatch.setattr(
            "fairchem_dens.ops.so2.portions",
            lambda total, each, device, least: chunks.portions(total, each, device),
        )
        edges = make_edges(counts)
        wigner = wigner_packed(frames(len(edges)), ROWS)
        x, hidden = learned(len(counts), 9, 2), learned(len(edges), 3)
        weight, bias = learned(ROWS.num_radial * 4, 3), learned(ROWS.num_radial * 4)
        weights, bias_0 = [learned(5, 3 * 4), learned(6, 4 * 4)], learned(5)
        inputs = [x, hidden, weight, bias, bias_0, *weights]

        found = rotate_and_convolve(x, edges, wigner, RadialTail(hidden, weight, bias), weights, bias_0, ROWS)
        scale = torch.nn.functional.linear(hidden, weight, bias).unflatten(1, (ROWS.num_radial, -1))
        expected = convolve(rotate(x, edges, wigner, scale, ROWS), weights, bias_0, ROWS)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn(found.shape)
        for one, other in zip(
            torch.autograd.grad(found, inputs, direction),
            torch.autograd.grad(expected, inputs, direction),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_cover_all(self):
        device = torch.device("cpu")
        for total, size, least in ((0, 1, 1), (10, 2**22, 1), (10, 2**22, 4), (10, 1, 1)):
            parts = list(chunks.portions(total, size, device, least))
            assert [i for part in parts for i in range(total)[part]] == list(range(total))
            assert all(part.stop - part.start >= least for part in parts[:-1])


def test_unused_parameters_get_zeros_and_frozen_ones_nothing():
    x, unused, frozen = learned(3), learned(2, 2), torch.randn(2)
    with_zero_gradients(x, [unused, frozen]).sum().backward()
    assert torch.equal(x.grad, torch.ones(3)) and torch.equal(unused.grad, torch.zeros(2, 2))
    assert frozen.grad is None
    assert with_zero_gradients(x, [frozen]) is x
