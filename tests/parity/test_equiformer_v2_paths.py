"""Our operations against fairchem's modules, in double precision: the same outputs and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.equiformer_v2 import memory, paths
from model_cases import disturbed
from paths_compared import assert_same, run
from precision import double_precision
from structures import partly_corrupted

TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with double_precision(monkeypatch):
        yield


@pytest.fixture
def batch(structure: Any) -> Batch:
    structures = [structure(0, dtype=torch.float64), structure(1, natoms=7, dtype=torch.float64)]
    return partly_corrupted(Batch.from_data_list(structures))


def build(settings: dict[str, Any], lmax: int = 2, mmax: int = 2, **changes: Any) -> EquiformerV2DeNS:
    torch.manual_seed(0)
    sizes = {"lmax_list": [lmax], "mmax_list": [mmax], "grid_resolution": None, "max_neighbors": 8}
    without_dropout = {"alpha_drop": 0.0, "drop_path_rate": 0.0}
    return disturbed(EquiformerV2DeNS(**settings | sizes | without_dropout | changes)).train()


@pytest.mark.parametrize(("lmax", "mmax"), [(2, 2), (3, 1), (2, 0)])
def test_small_degrees(model_settings, batch, lmax, mmax):
    assert_same(build(model_settings, lmax, mmax), batch, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("lmax", "mmax"), [(6, 2), (4, 2), (6, 3)])
def test_degrees_of_the_papers_models(model_settings, batch, lmax, mmax, strict):
    model = build(model_settings, lmax, mmax, num_layers=2, enforce_max_neighbors_strictly=strict)
    assert_same(model, batch, TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_type": "layer_norm"},
        {"norm_type": "rms_norm_sh"},
        {"share_atom_edge_embedding": True},
        {"use_atom_edge_embedding": False},
        {"use_m_share_rad": True},
        {"use_attn_renorm": False},
        {"use_gate_act": True, "use_grid_mlp": True},
        {"use_gate_act": True, "use_grid_mlp": False},
        {"use_grid_mlp": False},
        {"use_sep_s2_act": False},
        {"use_sep_s2_act": False, "use_grid_mlp": False},
        {"recompute": "none"},
        {"recompute": "layers"},
        {"regress_forces": False},
    ],
    ids=str,
)
def test_each_variant(model_settings, batch, changes):
    assert_same(build(model_settings, **changes), batch, TOLERANCE)


@pytest.mark.parametrize("recompute", memory.LEVELS)
def test_the_same_random_numbers(model_settings, batch, recompute):
    """Dropout is drawn in the order, number and type of fairchem's code."""
    drops = {"alpha_drop": 0.3, "drop_path_rate": 0.4, "proj_drop": 0.2}
    assert_same(build(model_settings, recompute=recompute, **drops), batch, TOLERANCE)


def cut(batch: Batch, spread: float) -> Batch:
    """The structures with their atoms pulled apart, not periodic."""
    batch = batch.clone()
    batch.pos = spread * batch.pos
    batch.pbc = torch.zeros_like(batch.pbc)
    return batch


@pytest.mark.parametrize(
    ("changes", "spread"),
    [
        ({"enforce_max_neighbors_strictly": False}, 1.0),  # nodes of different degrees
        ({"max_neighbors": 500}, 1.0),
        ({"max_neighbors": 1}, 1.0),
        ({"max_radius": 2.6}, 1.0),  # among them nodes without any
        ({}, 100.0),  # no edge at all
    ],
    ids=["variable degree", "all neighbours", "one neighbour", "isolated atoms", "no edge"],
)
def test_graphs_of_all_kinds(model_settings, batch, changes, spread):
    assert_same(build(model_settings, **changes), cut(batch, spread), TOLERANCE)


def test_one_edge(model_settings, structure):
    pair = structure(0, natoms=2, dtype=torch.float64)
    pair.pbc = torch.zeros_like(pair.pbc)
    edges = torch.tensor([[1], [0]])
    single = Batch.from_data_list([Data(**pair.to_dict(), edge_index=edges, cell_offsets=torch.zeros(1, 3))])
    assert_same(build(model_settings, otf_graph=False), single, TOLERANCE)


def test_edges_in_any_order(model_settings, structure):
    """Stored edges need not be sorted."""
    data = structure(0, dtype=torch.float64)
    edges = torch.combinations(torch.arange(data.num_nodes)).T
    edges = torch.cat([edges, edges.flip(0)], dim=1)[:, torch.randperm(132)]
    stored = Batch.from_data_list(
        [Data(**data.to_dict(), edge_index=edges, cell_offsets=torch.zeros(132, 3))]
    )
    model = build(model_settings, otf_graph=False).eval()
    by_target = stored.clone()
    by_target.edge_index = edges[:, torch.argsort(edges[1])]
    found, expected = (run(model, one, paths.FAIRCHEM)[0] for one in (stored, by_target))
    ours = run(model, stored, model.operations)[0]
    for name in expected:
        for one in (found, ours):
            torch.testing.assert_close(one[name], expected[name], rtol=1e-11, atol=1e-11)


def test_same_weights_from_the_same_seed_on_each_level(model_settings):
    states = [build(model_settings, recompute=level).state_dict() for level in memory.LEVELS]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_repeats_itself(model_settings, batch):
    model = build(model_settings, alpha_drop=0.1, drop_path_rate=0.1)
    (first, gradients), (second, again) = (run(model, batch, model.operations) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_copies_take_the_same_path(model_settings, batch):
    model = build(model_settings).eval()
    copied = copy.deepcopy(model)
    first, second = (run(one, batch, one.operations)[0] for one in (model, copied))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mixed_precision_is_no_worse_than_fairchems(model_settings, batch):
    """Distance to double precision, in the root mean square over all outputs."""
    model = build(model_settings, num_layers=2).eval()
    exact = run(model, batch, model.operations)[0]
    single = copy.deepcopy(model).float()
    half = batch.clone()
    for name in ("pos", "cell", "forces", "condition_forces", "sigmas"):
        half[name] = half[name].float()
    errors = {}
    for label, path in (("ours", single.operations), ("fairchem", paths.FAIRCHEM)):
        torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, gradients = run(single, half, path)
        torch.set_default_dtype(torch.float64)
        assert all(torch.isfinite(one).all() for one in gradients.values() if one is not None)
        squares = [
            ((found[name].double() - exact[name]).square().mean() / exact[name].square().mean())
            for name in exact
        ]
        errors[label] = float(torch.stack(squares).mean().sqrt())
    assert errors["ours"] < 0.1
    assert errors["ours"] <= 1.3 * errors["fairchem"], errors
