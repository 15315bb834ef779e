"""What tests do with the outputs of models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

OUTPUTS = ("energy", "forces", "noise")
VECTORS = ("pos", "cell", "condition_forces")


def predict(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Predict without gradients; stock models switch them on by themselves."""
    with torch.no_grad():
        return {name: value.detach() for name, value in model(data).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same outputs, bit for bit."""
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences, relative to the largest output."""
    assert set(found) == set(expected)
    return {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same outputs to within ``tolerance`` of the largest."""
    errors = relative_errors(found, expected)
    assert max(errors.values()) < tolerance, errors


def joined(outputs: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of a batch, from those of its structures."""
    outputs = list(outputs)
    return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}


def transformed(data: Data, matrix: Tensor) -> Data:
    """A structure or batch, rotated or mirrored."""
    data = data.clone()
    for name in VECTORS:
        if name in data:
            data[name] = data[name] @ matrix.T
    return data


def rotation_errors(model: nn.Module, data: Data, matrix: Tensor) -> dict[str, float]:
    """Relative differences between transforming the input and transforming the outputs."""
    before, after = predict(model, data), predict(model, transformed(data, matrix))
    expected = {name: value if name == "energy" else value @ matrix.T for name, value in before.items()}
    return relative_errors(after, expected)


def assert_learns(model: nn.Module, data: Data) -> dict[str, Any]:
    """Each trainable parameter gets a finite gradient, which distributed training waits for.

    Returns:
        The outputs, which are finite.
    """
    outputs = model(data)
    sum(value.square().sum() for value in outputs.values()).backward()
    assert all(torch.isfinite(value).all() for value in outputs.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    return outputs
