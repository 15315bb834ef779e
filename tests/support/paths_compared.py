"""One model on our operations and on fairchem's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairchem_dens.models.equiformer_v2 import paths


def run(model: nn.Module, data: Any, path: Any, seed: int = 7) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs, and the gradients of a random linear function of them, of all parameters.

    The same seed gives the same frames of edges and the same function.
    """
    paths.choose(model, path)
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(data)
    torch.manual_seed(seed + 1)
    # Not randn_like, whose order of numbers is that of the strides.
    sum((value * torch.randn(value.shape)).sum() for value in outputs.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def assert_same(model: nn.Module, data: Any, tolerance: float) -> None:
    """The paths agree in outputs and gradients, each relative to the largest entry of the tensor.

    A gradient that is zero on one path is zero, and not missing, on the other.
    """
    ours, our_gradients = run(model, data, model.operations)
    theirs, their_gradients = run(model, data, paths.FAIRCHEM)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= tolerance * expected.abs().max(), name
    overall = max(float(one.abs().max()) for one in their_gradients.values() if one is not None)
    for name, expected in their_gradients.items():
        found = our_gradients[name]
        assert (found is None) == (expected is None), name
        if expected is None:
            continue
        # What cancels to nothing is known to the rounding of what cancels.
        size = max(float(expected.abs().max()), 1e-3 * overall)
        assert float((found - expected).abs().max()) <= tolerance * size, name
        assert bool(expected.any()) or not bool(found.any()), name
