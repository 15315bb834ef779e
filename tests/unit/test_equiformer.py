"""Equiformer: its parts against e3nn, its interface, its sizes, and training it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ase import Atoms
from e3nn import nn as e3nn_nn
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerDeNS
from fairchem_dens.models.equiformer.activation import Gate, ScalarActivation, silu, smooth_leaky_relu
from fairchem_dens.models.equiformer.blocks import AtomEmbedding, EdgeDegreeEmbedding
from fairchem_dens.models.equiformer.dropout import drop_path, dropout_channels
from fairchem_dens.models.equiformer.features import Features, in_order
from fairchem_dens.models.equiformer.graph import Edges, Neighbors, edge_vectors, find_neighbors
from fairchem_dens.models.equiformer.harmonics import SphericalHarmonics
from fairchem_dens.models.equiformer.linear import Linear
from fairchem_dens.models.equiformer.norm import EquivariantLayerNorm
from fairchem_dens.models.equiformer.radial import ExpNormalBasis, RadialProfile, hidden_features
from fairchem_dens.models.equiformer.tensor_product import DepthwiseTensorProduct
from model_cases import EQUIFORMER, disturbed
from outputs import assert_equal, assert_learns, predict
from precision import default_precision
from structures import molecule, partly_corrupted

L3 = {
    "irreps_equivariant_inputs": "1x0e+1x1e+1x2e+1x3e",
    "irreps_node_embedding": "128x0e+64x1e+64x2e+32x3e",
    "irreps_sh": "1x0e+1x1e+1x2e+1x3e",
    "irreps_pre_attn": "128x0e+64x1e+64x2e+32x3e",
    "irreps_head": "32x0e+16x1e+16x2e+8x3e",
    "irreps_mlp_mid": "384x0e+192x1e+192x2e+96x3e",
    "irreps_feature": "512x0e+256x1e+256x2e+128x3e",
}
BASELINE = {"irreps_equivariant_inputs": None, "irreps_feature": "512x0e"}


def build(**changes: Any) -> EquiformerDeNS:
    """In evaluation mode, with biases and norms that are not the zeros and ones that they start as."""
    torch.manual_seed(0)
    return disturbed(EquiformerDeNS(**EQUIFORMER | changes)).eval()


@pytest.fixture(scope="module")
def model() -> EquiformerDeNS:
    """A test that changes anything about it makes its own."""
    return build()


@pytest.fixture
def batch() -> Batch:
    """Two ordinary molecules, of 9 and 6 atoms."""
    return Batch.from_data_list([molecule(0), molecule(1, natoms=6)])


@pytest.fixture
def corrupted(batch: Batch) -> Batch:
    return partly_corrupted(batch, std=0.05)


def random_features(irreps: o3.Irreps, number: int) -> Features:
    return [torch.randn(number, ir.dim, mul, dtype=torch.float64) for mul, ir in irreps]


def row(features: Features) -> Tensor:
    """As e3nn holds them: channel by channel in one row."""
    return torch.cat([one.transpose(1, 2).flatten(1) for one in features], dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.fixture
def double_precision():
    with default_precision(torch.float64):
        yield


@pytest.mark.usefixtures("double_precision")
class TestPartsAgainstE3nn:
    """The paper's code is made of e3nn's tensor products, without their normalisation of paths."""

    @staticmethod
    def product(irreps_in, irreps_edge, irreps_out, instructions) -> o3.TensorProduct:
        return o3.TensorProduct(
            irreps_in,
            irreps_edge,
            irreps_out,
            instructions,
            path_normalization="none",
            internal_weights=False,
            shared_weights=False,
        )

    @pytest.mark.parametrize(
        ("irreps_in", "irreps_edge", "wanted"),
        [
            ("5x0e+4x1e+3x2e", "1x0e+1x1e+1x2e", "1x0e+1x1e+1x2e"),
            ("2x0e+3x1e+4x2e+5x3e", "1x0e+1x1e+1x2e+1x3e", "1x0e+1x1e+1x2e+1x3e"),
            ("4x0e+3x1e", "1x0e+1x1e+1x2e", "1x2e"),
            ("4x0e+2x0o+3x1o+2x1e+2x2e", "1x0e+1x1o+1x2e", "1x0e+1x0o+1x1o+1x1e+1x2e+1x2o"),
        ],
    )
    def test_depthwise_tensor_product(self, irreps_in, irreps_edge, wanted):
        irreps_in, irreps_edge, wanted = o3.Irreps(irreps_in), o3.Irreps(irreps_edge), o3.Irreps(wanted)
        blocks = [
            (mul, ir, source, edge)
            for source, (mul, ir_in) in enumerate(irreps_in)
            for edge, (_, ir_edge) in enumerate(irreps_edge)
            for ir in ir_in * ir_edge
            if ir in wanted or ir == o3.Irrep("0e")
        ]
        places = sorted(range(len(blocks)), key=lambda one: (blocks[one][1].l, -blocks[one][1].p, one))
        irreps_out = o3.Irreps([blocks[place][:2] for place in places])
        instructions = [
            (source, edge, places.index(place), "uvu", True)
            for place, (_, _, source, edge) in enumerate(blocks)
        ]
        theirs = self.product(irreps_in, irreps_edge, irreps_out, instructions)
        ours = DepthwiseTensorProduct(irreps_in, irreps_edge, wanted)
        assert ours.irreps_out == irreps_out.simplify() and ours.weight_numel == theirs.weight_numel

        x, harmonics = random_features(irreps_in, 7), torch.randn(7, irreps_edge.dim)
        weights = torch.randn(7, ours.weight_numel)
        found = ours(x, ours.couplings(harmonics), weights[:, ours.weight_order])
        assert_close(row(found), theirs(row(x), harmonics, weights))

    @pytest.mark.parametrize(
        ("irreps_in", "irreps_out"),
        [
            ("5x0e+4x1e+3x2e", "2x0e+3x1e+4x2e"),
            ("5x0e+4x1e", "2x0e+3x1e+4x2e"),
            ("5x0e+4x1e+2x2e", "3x0e"),
            ("5x0e+4x1e", "1x1e"),
            ("3x0e+2x0o+4x1o", "2x0e+2x0o+4x1e"),
        ],
    )
    def test_linear(self, irreps_in, irreps_out):
        irreps_in, irreps_out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        instructions = [
            (source, 0, place, "uvw", True)
            for source, (_, ir_in) in enumerate(irreps_in)
            for place, (_, ir_out) in enumerate(irreps_out)
            if ir_in == ir_out
        ]
        theirs = self.product(irreps_in, o3.Irreps("1x0e"), irreps_out, instructions)
        ours = Linear(irreps_in, irreps_out)
        assert ours.tp["weight"].numel() == theirs.weight_numel
        x = random_features(irreps_in, 7)
        expected = theirs(row(x), torch.ones(7, 1), ours.tp["weight"].expand(7, -1))
        assert_close(row(ours(x)), expected)
        for bias in ours.bias:
            torch.nn.init.normal_(bias)
            expected[:, : len(bias)] += bias
        assert len(ours.bias) == ("0e" in irreps_out)
        assert not len(Linear(irreps_in, irreps_out, bias=False).bias)
        assert_close(row(ours(x)), expected)

    @pytest.mark.parametrize("lmax", [1, 2, 3, 6])
    def test_spherical_harmonics(self, lmax):
        vectors = 3 * torch.randn(20, 3)
        vectors[:3] = torch.eye(3)
        expected = o3.spherical_harmonics(
            list(range(lmax + 1)), vectors, normalize=True, normalization="component"
        )
        assert_close(SphericalHarmonics(lmax)(vectors), expected)

    @pytest.mark.parametrize("irreps", ["5x0e+4x1e+3x2e", "3x0e+4x1o+2x2e", "6x0e"])
    def test_gate(self, irreps):
        irreps = o3.Irreps(irreps)
        gates = o3.Irreps([(irreps[1:].num_irreps, "0e")]) if len(irreps) > 1 else o3.Irreps("")
        theirs = e3nn_nn.Gate(irreps[:1], [F.silu], gates, [torch.sigmoid] * len(gates), irreps[1:])
        ours = Gate(irreps)
        assert ours.irreps_in == (irreps[:1] + gates + irreps[1:]).simplify()
        x = random_features(ours.irreps_in, 7)
        assert_close(row(ours(x)), theirs(row(x)))

    def test_scalar_activation(self):
        theirs = e3nn_nn.Activation(o3.Irreps("6x0e"), [F.silu])
        x = random_features(o3.Irreps("6x0e"), 7)
        assert_close(row(ScalarActivation()(x)), theirs(row(x)))

    def test_smooth_leaky_relu_keeps_the_variance(self):
        x = torch.linspace(-12, 12, 100001)
        density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        assert abs(float((smooth_leaky_relu(x).square() * density).sum()) - 1) < 5e-3
        far = smooth_leaky_relu(torch.tensor([-40.0, 40.0]))
        assert_close(far[0] / far[1], torch.tensor(-0.2))

    def test_surroundings_are_the_full_product_with_an_embedding_of_scalars(self):
        """All other irreps of that embedding are zeros: what is left out would be multiplied by them."""
        irreps, edge = o3.Irreps("5x0e+4x1e+3x2e"), o3.Irreps("1x0e+1x1e+1x2e")
        ours = EdgeDegreeEmbedding(irreps, edge, [6, 8], avg_degree=2.5)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter)
        mask = torch.rand(4, 3) > 0.3
        harmonics = torch.cat([torch.ones(12, 1), torch.randn(12, 8)], dim=1)
        nothing = torch.zeros(0, dtype=torch.long)
        edges = Edges(torch.zeros(4, 3, dtype=torch.long), nothing, mask, harmonics, torch.randn(12, 6))
        product = DepthwiseTensorProduct(irreps, edge, irreps)
        radial = RadialProfile([6, 8, product.weight_numel], product.weight_order)
        radial.load_state_dict(ours.rad.state_dict())
        embedded = [torch.zeros(12, ir.dim, mul) for mul, ir in irreps]
        embedded[0] = embedded[0] + ours.exp([torch.ones(12, 1, 1)])[0]
        messages = ours.proj(product(embedded, product.couplings(edges.harmonics), radial(edges.basis)))
        expected = (row(messages).view(4, 3, -1) * mask[..., None]).sum(dim=1) / math.sqrt(2.5)
        torch.testing.assert_close(row(ours(edges)), expected)

    def test_atoms_are_rows_of_the_linear_layer(self):
        embedding = AtomEmbedding(10, o3.Irreps("4x0e+2x1e"))
        torch.nn.init.normal_(embedding.atom_type_lin.bias[0])
        numbers = torch.tensor([9, 0, 3, 3])
        one_hot = F.one_hot(numbers, 10).to(torch.float64)
        expected = embedding.atom_type_lin([one_hot[:, None]])[0]
        assert torch.equal(embedding(numbers), expected)


class TestParts:
    def test_norm(self):
        irreps = o3.Irreps("5x0e+2x0o+4x1e")
        norm = EquivariantLayerNorm(irreps, eps=0.0)
        x = [3 * one.float() + 1 for one in random_features(irreps, 7)]
        normed = norm(x)
        for one in normed:
            torch.testing.assert_close(one.square().mean(dim=(1, 2)), torch.ones(7))
        torch.testing.assert_close(normed[0].mean(dim=(1, 2)), torch.zeros(7))
        assert normed[1].mean(dim=(1, 2)).abs().min() > 1e-3
        with torch.no_grad():
            norm.affine_weight.copy_(torch.arange(11.0))
            norm.affine_bias.copy_(torch.arange(5.0))
        expected = [normed[0] * torch.arange(5.0) + torch.arange(5.0), normed[1] * torch.tensor([5.0, 6.0])]
        expected.append(normed[2] * torch.arange(7.0, 11.0))
        for found, one in zip(norm(x), expected, strict=True):
            torch.testing.assert_close(found, one)

    @pytest.mark.parametrize("irreps", ["5x0e", "4x1e"])
    def test_derivatives_of_the_norm(self, irreps):
        """First and second ones, and third ones against those that torch takes step by step."""
        irreps = o3.Irreps(irreps)
        norm = EquivariantLayerNorm(irreps, eps=0.1).double()
        torch.manual_seed(0)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(3, irreps[0].ir.dim, irreps[0].mul, dtype=torch.float64, requires_grad=True)

        def ours(x: Tensor) -> Tensor:
            return norm([x])[0]

        def plain(x: Tensor) -> Tensor:
            is_scalar = irreps[0].ir == o3.Irrep("0e")
            one = x - x.mean(dim=-1, keepdim=True) if is_scalar else x
            one = one * (one.square().mean(dim=(1, 2), keepdim=True) + 0.1).rsqrt() * norm.affine_weight
            return one + norm.affine_bias if is_scalar else one

        assert torch.autograd.gradcheck(ours, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(ours, x, fast_mode=True)

        def third(function) -> Tensor:
            total = function(x).sin().sum()
            for _ in range(2):
                (gradient,) = torch.autograd.grad(total, x, create_graph=True)
                total = gradient.sin().sum()
            return torch.autograd.grad(total, x)[0]

        assert_close(third(ours), third(plain))

    def test_derivatives_of_the_gate(self):
        gate = Gate(o3.Irreps("3x0e+2x1e"))
        torch.manual_seed(0)
        shapes = [(2, ir.dim, mul) for mul, ir in gate.irreps_in]
        x = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(lambda *x: tuple(gate(x)), x, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *x: tuple(gate(x)), x, fast_mode=True)
        # The third one, of SiLU: as torch takes it.
        one = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
        found = []
        for function in (lambda one: gate([one, x[1]])[0], lambda one: silu(one[..., :3])):
            total = function(one).sin().sum()
            for _ in range(3):
                (gradient,) = torch.autograd.grad(total, one, create_graph=True)
                total = gradient.sin().sum()
            found.append(gradient)
        assert_close(*found)

    def test_radial_basis(self):
        basis = ExpNormalBasis(4.0, 6)
        distances = torch.tensor([0.5, 1.7, 3.99999, 4.0, 7.0], dtype=torch.float64)
        expected = torch.zeros(5, 6, dtype=torch.float64)
        for place, distance in enumerate(distances[:3].tolist()):
            for number in range(6):
                mean = math.exp(-4) + number / 5 * (1 - math.exp(-4))
                width = 2 / 6 * (1 - math.exp(-4))
                damping = (1 + math.cos(math.pi * distance / 4)) / 2
                expected[place, number] = damping * math.exp(
                    -(((math.exp(-5 / 4 * distance) - mean) / width) ** 2)
                )
        assert_close(basis(distances), expected)

    def test_radial_profile_computes_what_is_asked_for_in_that_order(self):
        every = RadialProfile([4, 6, 5], torch.arange(5))
        some = RadialProfile([4, 6, 5], torch.tensor([3, 0]))
        some.load_state_dict(every.state_dict())
        x = torch.randn(8, 4)
        torch.testing.assert_close(some(x), every(x)[:, [3, 0]])

    def test_hidden_layers_of_all_radial_profiles_at_once(self):
        """Values and gradients, to rounding, as one network after the other has them."""
        torch.manual_seed(0)
        profiles = [RadialProfile([4, 6, 5, size], torch.arange(size)).double() for size in (3, 7)]
        for profile in profiles:
            for parameter in profile.parameters():
                torch.nn.init.normal_(parameter)
        basis = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
        inputs = [basis, *(one for profile in profiles for one in profile.parameters())]
        together = [
            profile.from_hidden(hidden)
            for profile, hidden in zip(profiles, hidden_features(profiles, basis), strict=True)
        ]
        found = []
        for outputs in (together, [profile(basis) for profile in profiles]):
            (slope,) = torch.autograd.grad(sum(one.sin().sum() for one in outputs), basis, create_graph=True)
            by_all = torch.autograd.grad(slope.square().sum(), inputs, allow_unused=True)
            found.append([*outputs, slope, *(one for one in by_all if one is not None)])
        for one, other in zip(*found, strict=True):
            assert_close(one, other)

    def test_irreps_are_ordered_as_in_the_papers_code(self):
        assert in_order(o3.Irreps("1x1o+2x0e+3x1e+4x0o+5x0e")) == o3.Irreps("7x0e+4x0o+3x1e+1x1o")

    @pytest.mark.parametrize("dropped", [dropout_channels, drop_path])
    def test_dropout(self, dropped):
        x = [torch.ones(1000, 3, 8), torch.ones(1000, 1, 4)]
        batch = torch.arange(1000) // 2
        rest = (batch, 500) if dropped is drop_path else ()
        assert dropped(x, 0.25, False, *rest) is x
        for one in dropped(x, 0.25, True, *rest):
            torch.testing.assert_close(one.unique(), torch.tensor([0.0, 4 / 3]))
            assert abs(float(one.mean()) - 1) < 0.1
            assert (one == one[:, :1]).all(), "all components of a channel together"
            if dropped is drop_path:
                assert (one[::2] == one[1::2]).all() and (one == one[:, :1, :1]).all()

    def test_a_model_made_double_is_exact(self):
        """Clebsch-Gordan coefficients do not keep the precision that they were made in."""
        irreps, harmonics = o3.Irreps("2x0e+2x1e+2x2e"), o3.Irreps("1x0e+1x1e+1x2e")
        made_double = DepthwiseTensorProduct(irreps, harmonics, irreps).double()
        table = made_double.table
        with default_precision(torch.float64):
            assert torch.equal(table, DepthwiseTensorProduct(irreps, harmonics, irreps).table)
        assert not torch.equal(table, table.float().double())


class TestNeighbors:
    SIZES = (5, 1, 9, 2)

    @staticmethod
    def find(sizes, cutoff, scale=2.0) -> tuple[Tensor, Tensor, Neighbors]:
        natoms = torch.tensor(sizes)
        batch = torch.repeat_interleave(torch.arange(len(sizes)), natoms)
        pos = scale * torch.randn(len(batch), 3)
        return pos, batch, find_neighbors(pos, natoms, batch, cutoff)

    @staticmethod
    def pairs(index: Tensor, mask: Tensor) -> set[tuple[int, int]]:
        atoms = torch.arange(len(index))[:, None].expand_as(index)
        listed = list(zip(atoms[mask].tolist(), index[mask].tolist(), strict=True))
        assert len(set(listed)) == len(listed)
        return set(listed)

    @staticmethod
    def all_pairs(pos: Tensor, batch: Tensor, cutoff: float) -> set[tuple[int, int]]:
        return {
            (one, other)
            for one in range(len(pos))
            for other in range(len(pos))
            if one != other and batch[one] == batch[other] and (pos[one] - pos[other]).norm() < cutoff
        }

    @pytest.mark.parametrize("complete_up_to", [64, 3])
    @pytest.mark.parametrize("cutoff", [2.5, 100.0])
    def test_are_all_within_the_cutoff(self, monkeypatch, complete_up_to, cutoff):
        monkeypatch.setattr("fairchem_dens.models.equiformer.graph.COMPLETE_UP_TO", complete_up_to)
        pos, batch, neighbors = self.find(self.SIZES, cutoff)
        vectors, mask = edge_vectors(pos, neighbors, cutoff)
        expected = self.all_pairs(pos, batch, cutoff)
        assert self.pairs(neighbors.index, mask) == expected and len(expected) > 4
        vectors = vectors.view(*mask.shape, 3)
        for one, other in expected:
            place = int((neighbors.index[one] == other).nonzero()[0])
            torch.testing.assert_close(vectors[one, place], pos[other] - pos[one])
        assert (vectors[~mask].norm(dim=-1) == cutoff).all()

    def test_tables_of_large_structures_are_as_wide_as_needed(self):
        pos, batch, neighbors = self.find((100, 70), cutoff=2.0, scale=3.0)
        expected = self.all_pairs(pos, batch, 2.0)
        assert self.pairs(neighbors.index, neighbors.is_pair) == expected
        counts = torch.tensor([one for one, _ in expected]).bincount()
        assert neighbors.index.shape[1] == counts.max() < 60

    def test_of_lone_atoms(self):
        _, _, neighbors = self.find((1, 1), cutoff=5.0)
        assert neighbors.index.tolist() == [[0], [1]] and not neighbors.is_pair.any()

    def test_wide_and_narrow_tables_give_the_same_prediction(self, model, corrupted, monkeypatch):
        expected = predict(model, corrupted)
        monkeypatch.setattr("fairchem_dens.models.equiformer.graph.COMPLETE_UP_TO", 1)
        for name, value in predict(model, corrupted).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


class TestSizes:
    @pytest.mark.parametrize(
        ("changes", "millions"),
        [({}, 4.00), (L3, 6.35), (BASELINE, 3.50), (L3 | BASELINE, 5.50)],
        ids=["L2 + DeNS", "L3 + DeNS", "L2", "L3"],
    )
    def test_parameters_of_the_papers_models(self, changes, millions):
        assert round(EquiformerDeNS(**changes).num_params / 1e6, 2) == millions


class TestOutputs:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("with_gradients", [False, True])
    def test_regress_forces_false(self, model, corrupted, training, with_gradients):
        alone = build(regress_forces=False).train(training)
        assert not any("denoising" in name for name in alone.state_dict())
        alone.load_state_dict(model.state_dict(), strict=False)
        with torch.set_grad_enabled(with_gradients):
            outputs = alone(corrupted)
        assert set(outputs) == {"energy"} and outputs["energy"].requires_grad == with_gradients
        torch.testing.assert_close(outputs["energy"].detach(), predict(model, corrupted)["energy"])

    @pytest.mark.parametrize("training", [False, True])
    def test_without_gradients_nothing_is_kept(self, training, corrupted):
        model = build().train(training)
        outputs = predict(model, corrupted)
        assert not any(value.requires_grad for value in outputs.values())
        with_gradients = model(corrupted)
        assert with_gradients["energy"].requires_grad and with_gradients["noise"].requires_grad
        assert with_gradients["forces"].requires_grad == training
        for name in outputs:
            torch.testing.assert_close(with_gradients[name].detach(), outputs[name])

    def test_evaluation_leaves_no_gradients_behind(self, corrupted):
        model = build()
        predict(model, corrupted)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_cell_and_periodicity_are_not_needed(self, model, corrupted):
        expected = predict(model, corrupted)
        del corrupted.cell, corrupted.pbc, corrupted.fixed, corrupted.tags
        assert_equal(predict(model, corrupted), expected)

    def test_scale_multiplies_the_energy(self, corrupted):
        one, two = (predict(build(scale=scale), corrupted) for scale in (None, 2.0))
        torch.testing.assert_close(two["energy"], 2 * one["energy"])
        torch.testing.assert_close(two["forces"], 2 * one["forces"])
        assert torch.equal(two["noise"], one["noise"])

    def test_energy_is_a_sum_over_atoms(self, model):
        """Two molecules far apart in one structure have the sum of their energies."""
        one, other = molecule(3), molecule(4, natoms=5)
        both = Data(
            pos=torch.cat([one.pos, other.pos + 50]),
            atomic_numbers=torch.cat([one.atomic_numbers, other.atomic_numbers]),
            natoms=14,
        )
        apart = predict(model, Batch.from_data_list([one, other]))
        together = predict(model, both)
        torch.testing.assert_close(together["energy"][0], apart["energy"].sum())
        torch.testing.assert_close(together["forces"], apart["forces"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_model_without_dens_ignores_conditioning(batch, corrupted, training):
    model = build(irreps_equivariant_inputs=None, irreps_feature="12x0e").train(training)
    assert not any("denoising" in name or "force_embed" in name for name in model.state_dict())
    assert_equal(predict(model, corrupted), predict(model, batch))
    assert set(predict(model, batch)) == {"energy", "forces"}


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("irreps_node_attr", "2x0e"),
            ("basis_type", "gaussian"),
            ("rescale_degree", True),
            ("nonlinear_message", False),
            ("norm_layer", "graph"),
            ("use_pbc", True),
            ("otf_graph", False),
            ("mean", 1.5),
            ("std", 1.5),
            ("atomref", 1.5),
            ("irreps_in", "64x0e+3x1e"),
            ("irreps_in", "64x1e"),
            ("irreps_node_embedding", "nonsense"),
            ("irreps_node_embedding", "4x1e+8x0e"),
            ("irreps_node_embedding", "8x0e+4x1e+2x1e"),
            ("irreps_head", "4x1e"),
            ("irreps_head", "4x0e+2x1o+2x2e"),
            ("irreps_sh", None),
            ("irreps_sh", "1x0e+2x1e"),
            ("irreps_sh", "1x0e+1x2e"),
            ("irreps_sh", "1x0e+1x1o+1x2o"),
            ("irreps_equivariant_inputs", "3x0e"),
            ("irreps_equivariant_inputs", "1x0e"),
            ("num_layers", 0),
            ("num_heads", 0),
            ("number_of_basis", 0),
            ("alpha_drop", 1.0),
            ("drop_path_rate", -0.5),
            ("max_radius", -1.0),
            ("max_radius", "far"),
        ],
    )
    def test_unsupported_value_is_refused_by_name(self, name, value):
        with pytest.raises(ValueError, match=rf"(?s)'model\.{name}'.*{value}".replace("+", r"\+")):
            build(**{name: value})

    @pytest.mark.parametrize(
        "changes",
        [
            {"irreps_pre_attn": None},
            {"irreps_pre_attn": "6x0e+5x1e+3x2e"},
            {"irreps_head": "4x0e+2x1e"},
            {"irreps_sh": "1x0e+1x1e"},
            {"irreps_equivariant_inputs": "1x0e+1x1e"},
            {"irreps_equivariant_inputs": "1x0e+1x1e+1x2e+1x3e"},
            {"fc_neurons": [8, 6, 4]},
            {"alpha_drop": 0.1, "proj_drop": 0.1, "out_drop": 0.1, "drop_path_rate": 0.1},
            {"num_layers": 1},
        ],
        ids=str,
    )
    def test_supported_variants_predict_and_learn(self, corrupted, changes):
        assert_learns(build(**changes).train(), corrupted)

    def test_dropout_is_reproducible_and_off_in_evaluation(self, corrupted):
        model = build(alpha_drop=0.2, proj_drop=0.2, out_drop=0.2, drop_path_rate=0.2)
        assert_equal(predict(model, corrupted), predict(build(), corrupted))
        model.train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(predict(model, corrupted)["energy"])
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


class TestStateDict:
    def test_of_a_model_without_dens_holds_parameters_only(self):
        model = build(irreps_equivariant_inputs=None)
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]

    def test_constants_of_generated_code_are_dropped(self, model, corrupted):
        """What an official file holds beside the parameters."""
        state = {
            **model.state_dict(),
            "blocks.0.ga.sep_act.dtp.tp.weight": torch.zeros(0),
            "blocks.0.ga.sep_act.dtp.tp.output_mask": torch.ones(9),
            "blocks.0.ga.sep_act.dtp.tp._compiled_main_left_right._w3j_1_1_1": torch.ones(3, 3, 3),
            "blocks.0.ffn.fctp_1.gate.mul.weight": torch.zeros(0),
            "rbf.means": torch.linspace(math.exp(-5), 1, 8),
            "rbf.betas": torch.full((8,), (2 / 8 * (1 - math.exp(-5))) ** -2),
            "atomref": torch.zeros(64),
        }
        other = EquiformerDeNS(**EQUIFORMER).eval()
        other.load_state_dict(state, strict=True)
        assert_equal(predict(other, corrupted), predict(model, corrupted))

    def test_only_norms_and_biases_are_not_decayed(self, model):
        kept = model.no_weight_decay()
        names = {name for name, _ in model.named_parameters()}
        assert kept <= names
        assert {name for name in names if "norm" in name or ".net.1." in name} <= kept
        assert {name for name in names if "bias" in name} <= kept
        for name in ("atom_embed.atom_type_lin.tp.weight", "force_embed.tp.weight", "blocks.0.ga.alpha_dot"):
            assert name in names - kept


class TestGradients:
    """Distributed training waits for the gradient of each parameter."""

    @pytest.mark.parametrize("kind", ["ordinary", "partly corrupted", "all conditioned", "lone atoms"])
    @pytest.mark.parametrize(
        "changes",
        [{"regress_forces": False}, {"irreps_equivariant_inputs": None, "irreps_feature": "12x0e"}],
        ids=str,
    )
    def test_each_parameter_has_one(self, batch, corrupted, kind, changes):
        data = batch if kind == "ordinary" else corrupted
        if kind == "all conditioned":
            data.condition_forces, data.corrupted = data.forces, torch.tensor([True, True])
        if kind == "lone atoms":
            data = Batch.from_data_list([molecule(0, natoms=1)] * 2)
        assert_learns(build(**changes).train(), data)

    def test_forces_teach_the_energy(self, corrupted):
        """Through the second derivative; the last bias alone says nothing of forces."""
        model = build().train()
        model(corrupted)["forces"].square().sum().backward()
        assert (model.energy_head[0].tp["weight"].grad != 0).any()
        assert model.energy_head[2].bias[0].grad is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_lmdb):
    root = tmp_path_factory.mktemp("molecules")
    seeds = {"train": range(16), "val": range(100, 105), "test": range(200, 205)}
    return {
        split: write_lmdb(root / split, [molecule(seed, natoms=6 + seed % 3) for seed in chosen])
        for split, chosen in seeds.items()
    }


@pytest.fixture
def settings(run_settings, folders):
    """The YAML of a small run on molecules, set as the paper's on MD17."""
    settings = run_settings
    settings["model"] = {"name": "equiformer_dens", **copy.deepcopy(EQUIFORMER)}
    for split, folder in folders.items():
        settings["dataset"][split]["src"] = str(folder)
    settings["dataset"]["train"]["transforms"] = {
        "normalizer": {"energy": {"mean": 20.0, "rmsd": 10.0}, "forces": {"mean": 0.0, "rmsd": 10.0}},
        "dens": {"prob": 0.5, "std": 0.05, "corrupt_ratio": 0.5, "switch": "structure"},
    }
    settings["loss_functions"] = [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 10}},
        {"noise": {"fn": "l2mae", "coefficient": 1, "reduction": "separate", "decay": "linear"}},
    ]
    settings["optim"].update(lr_initial=0.01, max_epochs=6)
    for name in ("ema_decay", "clip_grad_norm"):
        del settings["optim"][name]
    return settings


class TestTraining:
    @pytest.mark.parametrize("ema_decay", [None, 0.5])
    def test_errors_fall(self, settings, make_trainer, ema_decay):
        settings["optim"]["ema_decay"] = ema_decay
        trainer = make_trainer(settings)
        start = {name: one.detach().clone() for name, one in trainer._unwrapped_model.named_parameters()}
        before = trainer.validate(split="val")
        trainer.train()
        after = trainer.validate(split="val")
        for name in ("energy_mae", "forces_mae"):
            assert after[name]["metric"] < 0.9 * before[name]["metric"], name
        moved = {
            name for name, one in trainer._unwrapped_model.named_parameters() if not one.equal(start[name])
        }
        assert set(start) - moved <= {"denoising_pos_head.sep_value.lin.bias.0"}

    def test_predictions_are_those_of_the_model(self, settings, make_trainer):
        trainer = make_trainer(settings)
        found = trainer.predict(trainer.test_loader, per_image=True, disable_tqdm=True)
        seeds = [int(name.split("_")[0]) for name in found["ids"]]
        assert sorted(seeds) == list(range(200, 205))
        molecules = Batch.from_data_list([molecule(seed, natoms=6 + seed % 3) for seed in seeds])
        expected = predict(trainer._unwrapped_model.eval(), molecules)
        np.testing.assert_allclose(np.array(found["energy"]).ravel(), 20 + 10 * expected["energy"], rtol=1e-3)
        np.testing.assert_allclose(np.concatenate(found["forces"]), 10 * expected["forces"], atol=1e-2)

    def test_without_dens(self, settings, make_trainer):
        settings["model"] |= {"irreps_equivariant_inputs": None, "irreps_feature": "12x0e"}
        del settings["dataset"]["train"]["transforms"]["dens"], settings["loss_functions"][2]
        trainer = make_trainer(settings)
        before = trainer.validate(split="val")["forces_mae"]["metric"]
        trainer.train()
        assert trainer.validate(split="val")["forces_mae"]["metric"] < 0.9 * before

    def test_a_model_without_dens_cannot_be_trained_with_it(self, settings, make_trainer):
        settings["model"] |= {"irreps_equivariant_inputs": None, "irreps_feature": "12x0e"}
        with pytest.raises(ValueError, match="does not predict noise"):
            make_trainer(settings).train()

    def test_checkpoint_and_calculator(self, settings, make_trainer, tmp_path):
        from fairchem.core import OCPCalculator

        settings["optim"]["max_epochs"] = 1
        trainer = make_trainer(settings)
        trainer.train()
        data = molecule(7)
        expected = predict(trainer._unwrapped_model.eval(), data)
        (path,) = tmp_path.glob("checkpoints/*/checkpoint.pt")
        atoms = Atoms(data.atomic_numbers.numpy(), data.pos.numpy())
        atoms.calc = OCPCalculator(checkpoint_path=str(path), cpu=True, seed=0)
        assert atoms.get_potential_energy() == pytest.approx(20 + 10 * float(expected["energy"]), rel=1e-3)
        np.testing.assert_allclose(atoms.get_forces(), 10 * expected["forces"], atol=2e-2)
