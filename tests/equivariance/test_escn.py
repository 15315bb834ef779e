"""Symmetries that eSCN + DeNS has up to the points on the sphere that it reads.

Everything here is in double precision, so that a tolerance speaks of the model and not of rounding. What the
graph alone decides is tested with EquiformerV2, which builds it by the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from e3nn import o3
from fairchem.core.models.escn.escn import EnergyBlock, ForceBlock, LayerBlock, MessageBlock
from torch import nn
from torch_geometric.data import Batch, Data

from fairchem_dens.models import ESCNDeNS, graph
from model_cases import rescaled
from outputs import assert_close, predict, rotation_errors
from precision import default_precision, double_precision

ROUNDING = 1e-11
"""Relative to the largest output; heads sum dozens of points that cancel, which costs three of 16 digits."""


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with double_precision(monkeypatch):
        yield


ARGUMENTS: dict[str, Any] = {
    # All neighbours within the cutoff: which of two equally far ones to drop is no question of symmetry.
    "max_neighbors": 500,
    "cutoff": 4.0,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [2],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 32,
    "distance_resolution": 0.2,
}


@default_precision(torch.float64)
def make_model(**changes: Any) -> ESCNDeNS:
    """A model in evaluation mode whose signals neither vanish nor explode, unlike those it starts with."""
    torch.manual_seed(0)
    return rescaled(ESCNDeNS(**ARGUMENTS | changes)).eval()


@default_precision(torch.float64)
def with_exact_heads(model: ESCNDeNS) -> ESCNDeNS:
    """Replace what makes the heads inexact.

    Without an activation they read polynomials of a degree up to lmax + 1, over which the mean of the corners
    of an icosahedron is the mean of the sphere if the degree is at most 5.
    """
    golden_ratio = (1 + 5**0.5) / 2
    corners = torch.cartesian_prod(torch.tensor([0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    corners = corners * torch.tensor([1.0, 1.0, golden_ratio])
    points = torch.cat([corners.roll(axis, dims=1) for axis in range(3)])
    points = points / points.norm(dim=1, keepdim=True)
    harmonics = o3.spherical_harmonics(list(range(model.lmax_list[0] + 1)), points, normalize=False)
    with torch.no_grad():
        model.sphere_points.copy_(points)
        model.sphharm_weights[0].copy_(harmonics)
    return without_activation(model, (EnergyBlock, ForceBlock))


def without_activation(model: ESCNDeNS, blocks: tuple[type[nn.Module], ...]) -> ESCNDeNS:
    for module in model.modules():
        if isinstance(module, blocks):
            module.act = nn.Identity()
    return model


def worst_error(model: ESCNDeNS, data: Data) -> float:
    """Of three rotations."""
    torch.manual_seed(5)
    return max(max(rotation_errors(model, data, o3.rand_matrix()).values()) for _ in range(3))


orders = pytest.mark.parametrize(
    "orders",
    [
        {"lmax_list": [2], "mmax_list": [2]},
        {"lmax_list": [2], "mmax_list": [1]},
        {"lmax_list": [3], "mmax_list": [2]},
    ],
    ids=str,
)


class TestRotation:
    @orders
    def test_exact_without_what_samples_the_sphere(self, batch, orders):
        """Conditioning, frames of edges, convolutions and tables of the grids have no error of their own."""
        model = with_exact_heads(make_model(num_sphere_samples=12, **orders))
        without_activation(model, (LayerBlock, MessageBlock))
        assert worst_error(model, batch) < ROUNDING

    @orders
    def test_error_of_the_blocks_shrinks_with_grid_resolution(self, batch, orders):
        """SiLU makes harmonics above lmax, which a grid of R points mistakes for lower ones.

        It is analytic, so their size falls geometrically with R: by fifty and more from each to the next.
        """
        tolerance = {8: 0.3, 14: 5e-3, 20: 1e-4}
        worst = {
            resolution: worst_error(
                with_exact_heads(make_model(num_sphere_samples=12, resolution=resolution, **orders)), batch
            )
            for resolution in tolerance
        }
        assert all(worst[resolution] < tolerance[resolution] for resolution in tolerance), worst
        assert worst[20] < worst[14] / 30 and worst[14] < worst[8] / 30, worst

    def test_error_of_the_heads_shrinks_with_the_points_on_the_sphere(self, batch):
        """fairchem spreads them evenly by a spiral; means over it converge a little faster than 1/points."""
        tolerance = {32: 0.3, 256: 1e-2, 2048: 1e-3}
        worst = {
            samples: worst_error(make_model(num_sphere_samples=samples, resolution=20), batch)
            for samples in tolerance
        }
        assert all(worst[samples] < tolerance[samples] for samples in tolerance), worst
        assert worst[2048] < worst[256] / 8 and worst[256] < worst[32] / 8, worst

    def test_roll_about_the_edge_does_not_matter(self, batch, monkeypatch):
        """But for the grids. Why it may be random in training and fixed in evaluation."""
        model = without_activation(make_model(), (MessageBlock,))
        expected = predict(model, batch)
        frames = graph.edge_frames
        monkeypatch.setattr(
            "fairchem_dens.models.escn.edge_frames",
            lambda vectors, random_roll: frames(vectors, random_roll=True),
        )
        assert_close(predict(model, batch), expected, ROUNDING)


def test_a_single_edge_is_as_good_as_many(make):
    """fairchem's blocks overwrite what the gradient needs when there is exactly one."""
    model = make_model(use_pbc=False, otf_graph=False)
    pair = make(0, natoms=2)
    del pair.noise_mask
    pair.edge_index = torch.tensor([[0], [1]])
    gradients = []
    for copies in (1, 2):
        outputs = model(Batch.from_data_list([pair] * copies))
        model.zero_grad()
        sum(value.square().sum() for value in outputs.values()).backward()
        gradients.append({n: p.grad / copies for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-15, msg=name)
