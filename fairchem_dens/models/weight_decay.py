"""Which parameters are decayed: as in the paper's code, all but biases and the affine parameters of norms.

fairchem's own choice is different: it keeps everything with "embedding" in its name from decaying, and decays
norms inside a hydra model.
"""

from __future__ import annotations

from typing import Any

from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from torch import nn


def kept_from_decay(model: nn.Module) -> set[str]:
    """Return the full names of the parameters of any model that are not decayed: the model's own choice.

    Except for fairchem's EquiformerV2 of backbone and heads, where the choice of the backbone is lost.
    """
    if isinstance(model, HydraModel) and isinstance(model.backbone, EquiformerV2Backbone):
        return no_weight_decay(model)
    own_choice: Any = getattr(model, "no_weight_decay", set)
    return set(own_choice())


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that are not decayed.

    Embeddings are decayed, the force embedding among them; so are attention vectors.
    """
    names = set()
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        is_bias = module_name.rpartition(".")[2] == "bias"  # a list of them, one for each irrep
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or is_bias or name == "bias" or name.endswith("_bias"):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names
