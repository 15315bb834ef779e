"""State dicts that hold parameters and nothing else.

The blocks of EquiformerV2 register grids, index maps and the like as buffers, hundreds of them, and old
checkpoints carry them. They follow from the
arguments of the model: they are not saved, and those of a file are compared with ours and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CONSTANT = (
    "SO3_grid",
    "SO3_rotation",
    "mappingReduced",
    "expand_index",
    "balance_degree_weight",
    "distance_expansion.offset",
)
"""Names of constant buffers in the paper's and fairchem's EquiformerV2 and eSCN."""


def make_buffers_transient(model: nn.Module) -> None:
    """Keep all buffers of a model out of its state dict."""
    for module in model.modules():
        module._non_persistent_buffers_set.update(module._buffers)


def is_constant(key: str) -> bool:
    """Whether a key of a state dict names a constant buffer rather than something learned."""
    return any(part in key for part in _CONSTANT)


class ParametersOnly(nn.Module):
    """Base of models whose state dict holds parameters only and that read files with constant buffers."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch hands the whole dict to each module before its children; what is deleted here no child sees.
        ours = dict(self.named_buffers(remove_duplicate=False))
        for key in [key for key in state_dict if key.startswith(prefix) and is_constant(key)]:
            _compare(key, state_dict.pop(key), ours.get(key[len(prefix) :]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _compare(key: str, theirs: Tensor, ours: Tensor | None) -> None:
    if ours is None:
        return
    if theirs.shape != ours.shape or not torch.allclose(theirs.to(ours), ours, atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"The checkpoint's constant '{key}' ({_shape(theirs)}) is not this model's ({_shape(ours)}): the "
            "two were built with different "
            "settings ('lmax_list', 'mmax_list', 'grid_resolution' or 'max_radius')."
        )


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "a number"
