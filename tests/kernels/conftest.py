"""Kernels run in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: kernels are not interpreted"
    ),
)
ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.fixture(params=[INTERPRETED, ON_GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are."""
    return request.param
