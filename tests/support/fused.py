"""Comparing a fused operation with its plain twin, in outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.ops.layout import Edges, edges_from

Operation = Callable[..., Tensor]

FORWARD, BACKWARD = 2e-6, 1e-5
"""Largest difference from float64 in single precision, over the largest value."""


def edges_of(*degrees: int, num_nodes: int | None = None, device: str = "cpu") -> Edges:
    """Return edges of which so many lead to each node, from sources that are drawn."""
    num_nodes = num_nodes or len(degrees)
    counts = torch.tensor([*degrees, *[0] * (num_nodes - len(degrees))])
    target = torch.repeat_interleave(torch.arange(num_nodes), counts)
    source = torch.randint(num_nodes, (len(target),))
    return edges_from(source.to(device), target.to(device), num_nodes)


def largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    if not expected.numel():
        return 0.0 if found.shape == expected.shape else float("inf")
    difference = (found.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-30).cpu())


def root_mean_square(found: Tensor, expected: Tensor) -> float:
    """Return the difference over the value, both by their norm: how precise all numbers are together."""
    difference = torch.linalg.vector_norm(found.double().cpu() - expected.double().cpu())
    return float(difference / torch.linalg.vector_norm(expected.double().cpu()).clamp(min=1e-30))


def run(
    operation: Operation,
    inputs: Sequence[Any],
    dtype: torch.dtype,
    device: str,
    weights: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return what an operation gives, and the gradients of those of its inputs that want one.

    Args:
        operation: of ``inputs``.
        inputs: tensors of floats are brought to dtype and device; those that want a gradient get one.
        dtype: see above.
        device: see above.
        weights: the gradient of the output; ones if not given.
    """

    def brought(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(device, dtype).requires_grad_(value.requires_grad)
        return value

    given = [brought(value) for value in inputs]
    out = operation(*given)
    wanted = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
    weights = torch.ones_like(out) if weights is None else weights.to(out)
    return out, list(torch.autograd.grad(out, wanted, weights)) if wanted else []


def errors(
    fused: Operation,
    plain: Operation,
    inputs: Sequence[Any],
    device: str,
    measure: Callable[[Tensor, Tensor], float] = largest,
) -> tuple[list[float], list[float]]:
    """Return how far a fused and a plain operation are from float64: of the output, then of each gradient."""
    exact, _ = run(plain, inputs, torch.float64, device)
    weights = torch.randn(exact.shape, dtype=torch.float64)
    exact, exact_gradients = run(plain, inputs, torch.float64, device, weights)
    far = []
    for operation in (fused, plain):
        out, gradients = run(operation, inputs, torch.float32, device, weights)
        assert out.shape == exact.shape
        pairs = zip([out, *gradients], [exact, *exact_gradients], strict=True)
        far.append([measure(one, other) for one, other in pairs])
    return far[0], far[1]


def check(fused: Operation, plain: Operation, inputs: Sequence[Any], device: str) -> None:
    """Fail if a fused operation, or one of its gradients, is too far from float64 in single precision."""
    found, _ = errors(fused, plain, inputs, device)
    assert found[0] <= FORWARD
    assert all(one <= BACKWARD for one in found[1:])
