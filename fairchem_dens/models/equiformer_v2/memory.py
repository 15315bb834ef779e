"""How much is kept for the gradient, and how much is computed a second time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

LEVELS = ("none", "activations", "layers")
"""Values of the argument ``recompute``.

- ``none``: what autograd keeps by itself; only the grids of the activations are made again.
- ``activations``: radial weights and rotated features, the next largest tensors, are made again as well.
- ``layers``: of an attention or feed-forward layer, only its input is kept.
"""

# What torch 2.4 says about its own code, at each use.
warnings.filterwarnings("ignore", message=".*torch.cpu.amp.autocast", category=FutureWarning)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call a function that draws no random numbers, and call it again when its gradient is wanted."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
