"""Which parameters are decayed: as in the paper's code, all but biases and the affine parameters of norms.

fairchem's own choice is different: it keeps everything with "embedding" in its name from decaying, and decays
norms inside a hydra model.
"""

from __future__ import annotations

from torch import nn


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that are not decayed.

    Embeddings are decayed, the force embedding among them; so are attention vectors.
    """
    names = set()
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name == "bias" or name.endswith("_bias"):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names
