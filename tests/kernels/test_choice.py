"""Which operations are taken, what they do in half precision and in two runs, and a whole model on them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Batch

from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.equiformer_v2 import paths
from fairchem_dens.ops import fused
from fairchem_dens.ops.layout import Rows
from fairchem_dens.ops.operations import PLAIN, Operations
from fairchem_dens.ops.so2 import RadialTail
from fused import Operation, check, edges_of, errors, root_mean_square, run
from model_cases import disturbed
from outputs import rotation_errors
from structures import conditioned


@pytest.fixture
def operations(device: str, monkeypatch: pytest.MonkeyPatch) -> Operations:
    monkeypatch.setenv(fused.SWITCH, "fused")
    return fused.operations()


def cases(
    one: Operations, device: str, channels: int = 16
) -> Iterator[tuple[str, Operation, Operation, list[Any]]]:
    """Each operation, its plain twin, and inputs."""
    edges, rows = edges_of(3, 0, 2, device=device), Rows(2, 1)
    heads = channels // 4

    def learned(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    def constant(*shape: int) -> Tensor:
        return torch.randn(shape)

    def convolution(path: Operations) -> Operation:
        def operation(x: Tensor, wigner: Tensor, hidden: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
            tail = RadialTail(hidden, weight, weight[:, 0])
            return path.rotate_and_convolve(x, edges, wigner, tail, weights, weights[0][:, 0], rows)

        return operation

    def rotation(path: Operations) -> Operation:
        return lambda x, wigner, scale: path.rotate(x, edges, wigner, scale, rows)

    def attention(path: Operations) -> Operation:
        return lambda values, logits, wigner: path.attend(values, logits, wigner, edges, rows, None)

    def embedding(path: Operations) -> Operation:
        return lambda radial, wigner: path.edge_degree(radial, wigner, edges, rows)

    def norm(path: Operations) -> Operation:
        return lambda x, weight, bias: path.equivariant_norm(x, weight, bias, 1e-5, "layer_norm_sh")

    width = rows.num_radial * 2 * channels
    weights = [learned(3, size * 2 * channels) for size in rows.sizes]
    values, x = learned(len(edges), rows.num_kept, channels), learned(3, rows.num_full, channels)
    wigner = constant(len(edges), rows.num_packed)
    tables = [constant(18, rows.num_kept), constant(18, rows.num_kept)]
    full = [constant(18, rows.num_full), constant(18, rows.num_full)]
    inputs = {
        "rotate_and_convolve": (
            convolution,
            [x, wigner, learned(len(edges), 4), learned(width, 4), *weights],
        ),
        "rotate": (rotation, [x, wigner, learned(len(edges), rows.num_radial, 2 * channels)]),
        "attend": (attention, [values, learned(len(edges), heads), wigner]),
        "s2_activation": (
            lambda path: path.s2_activation,
            [learned(len(edges), rows.num_kept, channels), learned(len(edges), channels), *tables],
        ),
        "grid_mlp": (
            lambda path: path.grid_mlp,
            [learned(3, rows.num_full, channels), learned(channels, channels), *full],
        ),
        "edge_degree": (embedding, [learned(len(edges), rows.lmax + 1, channels), wigner]),
        "equivariant_norm": (
            norm, [learned(3, rows.num_full, channels), learned(rows.lmax + 1, channels), learned(channels)],
        ),
    }  # fmt: skip
    for name, (operation, given) in inputs.items():
        yield name, operation(one), operation(PLAIN), given


def test_each_is_fused_and_agrees(
    operations: Operations, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _, found, expected, inputs in cases(operations, device):
            check(found, expected, inputs, device)
    # The exact results are in float64; nothing else may have been left to the plain twins, but for one that a
    # GPU does better with its libraries in full single precision.
    left = [message for message in caplog.messages if "float64" not in message]
    assert all("'grid_mlp'" in message for message in left)
    assert not left or device == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(operations: Operations, device: str, dtype: torch.dtype) -> None:
    """No further from float64 than the plain operations under autocast."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not know bfloat16")

    def autocast(operation: Operation) -> Operation:
        def under(*inputs: Any) -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=inputs[0].dtype != torch.float64):
                return operation(*inputs)

        return under

    for name, found, expected, inputs in cases(operations, device):
        wrong, twin = errors(autocast(found), autocast(expected), inputs, device, root_mean_square)
        # By chance some numbers are a little worse.
        assert all(one <= 1.25 * other + 1e-6 for one, other in zip(wrong, twin, strict=True)), (
            name,
            wrong,
            twin,
        )


def test_two_runs_are_the_same(operations: Operations, device: str) -> None:
    for name, found, _, inputs in cases(operations, device):
        first, gradients = run(found, inputs, torch.float32, device)
        second, others = run(found, inputs, torch.float32, device)
        pairs = zip([first, *gradients], [second, *others], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name


def test_what_is_not_fused_is_said_once(
    operations: Operations, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, weight, bias = torch.randn(2, 4, 3).to(device), torch.ones(2, 3).to(device), torch.zeros(3).to(device)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = operations.equivariant_norm(x, weight, bias, 1e-5, "layer_norm")
    assert torch.equal(found, PLAIN.equivariant_norm(x, weight, bias, 1e-5, "layer_norm"))
    assert caplog.text.count("'equivariant_norm' is not fused: there is no kernel for 'layer_norm'") == 1


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.SWITCH, "plain")
    with pytest.raises(RuntimeError, match=fused.SWITCH):
        fused.operations()
    monkeypatch.setenv(fused.SWITCH, "quick")
    with pytest.raises(ValueError, match="'quick'"):
        fused.operations()
    monkeypatch.delenv(fused.SWITCH)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no GPU"):
            fused.operations()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "activations"])
def test_a_model_on_them(
    operations: Operations, device: str, structure: Any, model_settings: dict[str, Any], recompute: str
) -> None:
    """Outputs and gradients are those of the plain operations, up to rounding."""
    batch = Batch.from_data_list([structure(seed, natoms=3 + seed) for seed in range(2)]).to(device)
    settings = model_settings | {"use_grid_mlp": True, "recompute": recompute}
    model = EquiformerV2DeNS(**settings).to(device).eval()
    results = []
    for path in (operations, PLAIN):
        one = copy.deepcopy(model)
        paths.choose(one, path)
        out = one(batch.clone())
        sum(value.square().sum() for value in out.values()).backward()
        gradients = {name: parameter.grad for name, parameter in one.named_parameters()}
        results.append(({name: value.detach() for name, value in out.items()}, gradients))
    for found, expected in zip(*results, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value is None or found[name] is None:  # forces are encoded in corrupted structures alone
                assert value is found[name], name
                continue
            scale = value.abs().max().clamp(min=1e-4)
            assert (found[name] - value).abs().max() <= 1e-4 * scale, name


@pytest.mark.slow
def test_a_model_on_them_turns_with_its_structure(
    operations: Operations, device: str, structure: Any, model_settings: dict[str, Any]
) -> None:
    """With gates instead of grids, which makes all of it equivariant up to rounding."""
    settings = model_settings | {"use_gate_act": True, "use_grid_mlp": False}
    model = disturbed(EquiformerV2DeNS(**settings)).to(device).eval()
    paths.choose(model, operations)
    data = Batch.from_data_list([conditioned(structure(0, natoms=5))]).to(device)
    assert max(rotation_errors(model, data, o3.rand_matrix().to(device)).values()) < 1e-4
