"""State dicts of the authors' own code, in each of our models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS, ESCNDeNS


@dataclass(frozen=True, kw_only=True)
class GoldenFile:
    """One of the files.

    Attributes:
        name: of the file.
        model: the class that it is for.
        bias: a parameter, which a test renames.
        constants: names, or parts of them, of what it holds besides parameters.
        others: arguments that make other constants, and what the error names.
    """

    name: str
    model: type[Any]
    bias: str
    constants: tuple[str, ...]
    others: tuple[tuple[str, Any, str], ...]


OF_EQUIFORMER_V2 = (
    "SO3_grid",
    "SO3_rotation",
    "mappingReduced",
    "expand_index",
    "balance_degree_weight",
    "distance_expansion",
)
FILES = (
    GoldenFile(
        name="eqv2_dens_l4m2.pt",
        model=EquiformerV2DeNS,
        bias="force_embedding.bias",
        constants=OF_EQUIFORMER_V2,
        others=(),
    ),
    GoldenFile(
        name="eqv2_dens_l2m2_sigma.pt",
        model=EquiformerV2DeNS,
        bias="force_embedding.bias",
        constants=OF_EQUIFORMER_V2,
        others=(("grid_resolution", 16, "grid_resolution"), ("max_radius", 7.0, "max_radius")),
    ),
    GoldenFile(
        name="escn_dens_l4m2.pt",
        model=ESCNDeNS,
        bias="force_embedding.bias",
        constants=("distance_expansion.offset", "expand_index"),
        others=(
            ("cutoff", 7.0, r"distance_expansion\.offset"),
            ("distance_resolution", 0.025, r"distance_expansion\.offset"),
        ),
    ),
    GoldenFile(
        name="equiformer_md17_dens_l2.pt",
        model=EquiformerDeNS,
        bias="force_embed.bias.0",
        constants=("output_mask", "_w3j_", "rbf."),
        others=(("max_radius", 4.0, "max_radius"), ("number_of_basis", 9, "number_of_basis")),
    ),
)
OTHERS = [(golden, *other) for golden in FILES for other in golden.others]


@pytest.fixture(scope="module", params=FILES, ids=lambda one: one.name)
def chosen(request: pytest.FixtureRequest) -> GoldenFile:
    return request.param


@pytest.fixture
def blank(model: nn.Module) -> nn.Module:
    """The same model without what it learned; quicker than to build one."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    return blank


def test_every_learned_value_is_the_files_in_the_files_order(chosen, file, model):
    """Optimizer and EMA states list parameters by position."""
    state = model.state_dict()
    learned = [
        name
        for name, value in file["state_dict"].items()
        if value.numel() and not any(part in name for part in chosen.constants)
    ]
    assert list(state) == learned == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(value, file["state_dict"][name]) for name, value in state.items())


@pytest.mark.parametrize("depth", [1, 2])
def test_loads_behind_the_prefixes_of_data_parallel_wrappers(file, model, blank, depth):
    """Checkpoints were saved from one or two wrappers, each of which adds ``module.``."""
    wrapped = blank
    for _ in range(depth):
        wrapped = nn.ModuleDict({"module": wrapped})
    prefix = "module." * depth
    wrapped.load_state_dict({prefix + name: value for name, value in file["state_dict"].items()}, strict=True)
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, model.state_dict()[name.removeprefix(prefix)])


def test_loading_does_not_change_the_file(file, blank):
    before = list(file["state_dict"])
    blank.load_state_dict(file["state_dict"])
    assert list(file["state_dict"]) == before


@pytest.mark.parametrize(
    ("of", "setting", "value", "says"), OTHERS, ids=[f"{one[0].name}-{one[1]}" for one in OTHERS]
)
def test_a_file_made_with_other_constants_is_refused(golden, of, setting, value, says):
    file = golden(of.name)
    model = of.model(**file["config"] | {setting: value})
    with pytest.raises(ValueError, match=says):
        model.load_state_dict(file["state_dict"])


def test_missing_and_unknown_parameters_are_named(chosen, file, blank):
    state = dict(file["state_dict"])
    misspelt = chosen.bias.replace("embed", "embeding", 1)
    state[misspelt] = state.pop(chosen.bias)
    with pytest.raises(RuntimeError, match=rf"(?s)Missing.*{chosen.bias}.*Unexpected.*{misspelt}"):
        blank.load_state_dict(state)
