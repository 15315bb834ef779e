"""The encoding of forces: exactly equivariant, exactly zero at zero, and what the paper's formula says."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import eval_legendre
from torch import Tensor, nn
from torch_geometric.data import Data

from fairchem_dens.models.conditioning import ForceEmbedding, add_conditioning, force_features

LMAX = 6
DEGREES = range(LMAX + 1)

seeds = st.integers(0, 2**32 - 1)
angles = st.floats(-math.pi, math.pi)
scales = st.floats(-9, 6).map(lambda exponent: 10.0**exponent)


def random_forces(seed: int, scale: float = 1.0, number: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(number, 3, generator=generator, dtype=torch.float64)


def of_degree(features: Tensor, degree: int) -> Tensor:
    return features[:, degree**2 : (degree + 1) ** 2]


def wigner(lmax: int, rotation: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """The rotation of vectors and of spherical tensors, both from the same Euler angles."""
    euler = [torch.tensor(angle, dtype=torch.float64) for angle in rotation]
    irreps = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
    # e3nn computes its generators of rotations in the default precision.
    torch.set_default_dtype(torch.float64)
    try:
        return o3.angles_to_matrix(*euler), irreps.D_from_angles(*euler)
    finally:
        torch.set_default_dtype(torch.float32)


@given(seeds, scales, st.tuples(angles, angles, angles))
def test_rotating_forces_rotates_their_encoding(seed, scale, rotation):
    forces = random_forces(seed, scale)
    matrix, d_matrix = wigner(LMAX, rotation)
    # Unit directions scaled by |f|/√3: the error is relative to the largest force.
    tolerance = 1e-10 * max(1.0, float(forces.norm(dim=1).max()))
    rotated = force_features(forces @ matrix.T, LMAX)
    torch.testing.assert_close(rotated, force_features(forces, LMAX) @ d_matrix.T, rtol=0, atol=tolerance)


@given(seeds, st.tuples(angles, angles, angles))
def test_embedding_is_equivariant_with_bias(seed, rotation):
    embedding = ForceEmbedding(LMAX, channels=5).double()
    nn.init.normal_(embedding.bias)
    forces = random_forces(seed)
    matrix, d_matrix = wigner(LMAX, rotation)
    rotated = embedding(force_features(forces @ matrix.T, LMAX))
    expected = torch.einsum("ij,njc->nic", d_matrix, embedding(force_features(forces, LMAX)))
    # The matrix exponential behind e3nn's matrices is off by 2e-10 at small angles.
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-9)


@given(seeds, scales)
def test_degree_one_is_the_force_and_degree_zero_its_norm(seed, scale):
    forces = random_forces(seed, scale)
    features = force_features(forces, LMAX)
    torch.testing.assert_close(of_degree(features, 1), forces, rtol=1e-14, atol=0)
    norm = forces.norm(dim=1, keepdim=True) / math.sqrt(3)
    torch.testing.assert_close(of_degree(features, 0), norm, rtol=1e-14, atol=0)


def test_degree_one_has_the_order_x_y_z():
    assert torch.equal(of_degree(force_features(torch.eye(3), 1), 1).round(decimals=6), torch.eye(3))


@given(seeds, scales)
def test_agrees_with_e3nn_normalising_by_itself(seed, scale):
    forces = random_forces(seed, scale)
    harmonics = o3.spherical_harmonics(list(DEGREES), forces, normalize=True, normalization="component")
    expected = forces.norm(dim=1, keepdim=True) / math.sqrt(3) * harmonics
    # Near a zero of a harmonic, rounding is relative to the largest component.
    torch.testing.assert_close(
        force_features(forces, LMAX), expected, rtol=0, atol=1e-12 * expected.abs().max()
    )


@given(seeds)
def test_addition_theorem(seed):
    """Y_l(a)·Y_l(b) = (2l + 1)·P_l(cos) fixes each degree up to a rotation, without e3nn."""
    forces = random_forces(seed)
    norm = forces.norm(dim=1)
    cosine = ((forces @ forces.T) / torch.outer(norm, norm)).clamp(-1, 1)
    features = force_features(forces, LMAX)
    for degree in DEGREES:
        part = of_degree(features, degree)
        legendre = torch.as_tensor(eval_legendre(degree, cosine.numpy()))
        expected = torch.outer(norm, norm) / 3 * (2 * degree + 1) * legendre
        torch.testing.assert_close(part @ part.T, expected, rtol=0, atol=1e-11)


@given(seeds)
def test_inversion_keeps_even_degrees_and_turns_odd_ones(seed):
    forces = random_forces(seed)
    features, inverted = force_features(forces, LMAX), force_features(-forces, LMAX)
    for degree in DEGREES:
        expected = (-1) ** degree * of_degree(features, degree)
        torch.testing.assert_close(of_degree(inverted, degree), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lmax", [0, 1, 2, LMAX])
def test_zero_force_is_encoded_as_exactly_zero_with_a_finite_gradient(lmax, dtype):
    forces = torch.zeros(3, 3, dtype=dtype)
    forces[1] = torch.tensor([0.3, -0.2, 0.1])
    forces.requires_grad_()
    features = force_features(forces, lmax)
    assert features.shape == (3, (lmax + 1) ** 2) and features.dtype == dtype
    assert torch.equal(features[[0, 2]], torch.zeros_like(features[[0, 2]]))
    assert features[1].abs().max() > 0
    features.sum().backward()
    assert torch.isfinite(forces.grad).all()
    assert torch.equal(forces.grad[[0, 2]], torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-10, 1e10])
def test_extreme_forces_stay_finite_in_single_precision(size):
    forces = (size * torch.tensor([[1.0, -2.0, 0.5]])).requires_grad_()
    features = force_features(forces, LMAX)
    features.sum().backward()
    assert torch.isfinite(features).all() and torch.isfinite(forces.grad).all()
    assert float(features.detach().abs().max()) < 20 * size


def test_gradient_agrees_with_finite_differences():
    forces = random_forces(0, number=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: force_features(values, LMAX), forces)


def test_no_atoms():
    assert force_features(torch.zeros(0, 3), 2).shape == (0, 9)


class TestForceEmbedding:
    def test_one_weight_for_each_degree_and_a_bias_on_scalars(self):
        embedding = ForceEmbedding(2, channels=4).double()
        nn.init.normal_(embedding.bias)
        features = torch.randn(3, 9, dtype=torch.float64)
        out = embedding(features)
        for index, degree in enumerate([0, 1, 1, 1, 2, 2, 2, 2, 2]):
            expected = features[:, index, None] * embedding.weight[degree, :, 0]
            torch.testing.assert_close(out[:, index], expected + (embedding.bias if index == 0 else 0))

    def test_bias_starts_at_zero(self):
        assert torch.equal(ForceEmbedding(2, 4).bias, torch.zeros(4))

    @pytest.mark.parametrize(("weight_init", "bound"), [("uniform", 1.0), (0.001, 0.001)])
    def test_uniform_weights_fill_their_range(self, weight_init, bound):
        weight = ForceEmbedding(6, 500, weight_init).weight.detach()
        assert 0.95 * bound < float(weight.max()) <= bound and -bound <= float(weight.min()) < -0.95 * bound

    def test_normal_weights(self):
        assert float(ForceEmbedding(6, 500, "normal").weight.detach().std()) == pytest.approx(1.0, abs=0.05)

    def test_state_dict_holds_weight_and_bias_only(self):
        assert set(ForceEmbedding(2, 4).state_dict()) == {"weight", "bias"}


class TestAddConditioning:
    """On 3 atoms, degrees 0 to 2, 4 channels."""

    embedding = torch.linspace(-1, 1, 3 * 9 * 4).reshape(3, 9, 4)

    @staticmethod
    def linear() -> ForceEmbedding:
        linear = ForceEmbedding(2, channels=4)
        nn.init.normal_(linear.bias)
        return linear

    def test_without_forces_only_the_bias_is_added(self):
        linear = self.linear()
        out = add_conditioning(self.embedding, Data(), linear)
        expected = self.embedding.clone()
        expected[:, 0] += linear.bias
        assert torch.equal(out, expected)

    def test_bias_is_added_to_each_atom_whatever_the_mask(self):
        """The mask acts on the forces, before the linear layer: a masked atom has the bias nevertheless."""
        linear = self.linear()
        forces = torch.randn(3, 3)
        forces[1] = 0
        conditioned = add_conditioning(self.embedding, Data(condition_forces=forces), linear)
        plain = add_conditioning(self.embedding, Data(), linear)
        assert torch.equal(conditioned[1], plain[1])
        assert not torch.equal(plain[1], self.embedding[1])
        change = linear(force_features(forces, 2)) - linear(torch.zeros(3, 9))
        torch.testing.assert_close(conditioned - plain, change)

    def test_embedding_is_not_changed_in_place(self):
        before = self.embedding.clone()
        data = Data(condition_forces=torch.randn(3, 3), sigmas=torch.ones(3, 1))
        add_conditioning(self.embedding, data, self.linear(), nn.Linear(1, 4))
        assert torch.equal(self.embedding, before)

    def test_force_encoding_can_be_hidden(self):
        linear, data = self.linear(), Data(condition_forces=torch.randn(3, 3))
        hidden = add_conditioning(self.embedding, data, linear, use_force_encoding=False)
        assert torch.equal(hidden, add_conditioning(self.embedding, Data(), linear))

    def test_sigma_enters_scalars_and_is_zero_where_it_is_unknown(self):
        linear, sigma_linear = self.linear(), nn.Linear(1, 4)
        sigmas = torch.tensor([[0.1], [0.1], [0.0]])
        plain = add_conditioning(self.embedding, Data(), linear)
        known = add_conditioning(self.embedding, Data(sigmas=sigmas), linear, sigma_linear)
        torch.testing.assert_close(known[:, 0] - plain[:, 0], sigma_linear(sigmas))
        assert torch.equal(known[:, 1:], plain[:, 1:])
        unknown = add_conditioning(self.embedding, Data(), linear, sigma_linear)
        torch.testing.assert_close(unknown[:, 0] - plain[:, 0], sigma_linear.bias.expand(3, 4))

    def test_sigma_of_shape_n_means_the_same(self):
        linear, sigma_linear = self.linear(), nn.Linear(1, 4)
        flat = add_conditioning(self.embedding, Data(sigmas=torch.ones(3)), linear, sigma_linear)
        column = add_conditioning(self.embedding, Data(sigmas=torch.ones(3, 1)), linear, sigma_linear)
        assert torch.equal(flat, column)

    def test_forces_of_double_precision_do_not_change_the_type_of_the_embedding(self):
        data = Data(condition_forces=torch.randn(3, 3, dtype=torch.float64))
        assert add_conditioning(self.embedding, data, self.linear()).dtype == torch.float32
