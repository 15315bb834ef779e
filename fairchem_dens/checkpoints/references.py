"""Per-element references that a model holds, turned into those that a checkpoint holds.

The authors' EquiformerV2 may carry ``energy_lin_ref``, energies per element in units of the energy's
normaliser. fairchem-core 1.10.0 keeps the same, in the unit of the data, as ``elementrefs`` of the
checkpoint, where every model can have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.checkpoints.weights import Weights
from fairchem_dens.keys import ENERGY

IN_MODEL = "energy_lin_ref"
_IN_CHECKPOINT = "element_references"


def taken_out(
    weights: Weights, normalizers: Mapping[str, Mapping[str, Tensor]], elementrefs: Mapping[str, Any]
) -> tuple[Weights, dict[str, Any], list[str]]:
    """Move the references of a model to its checkpoint, so that it predicts the same total energies.

    Args:
        weights: of the flat layout.
        normalizers: of the checkpoint, by target.
        elementrefs: of the checkpoint, by target.

    Returns:
        The weights without them, the references of the checkpoint, and what there is to say about it.

    Raises:
        ValueError: the checkpoint has other references already.
    """
    elementrefs = dict(elementrefs)
    if IN_MODEL not in weights:
        return weights, elementrefs, []
    rest = {name: value for name, value in weights.items() if name != IN_MODEL}
    if not weights[IN_MODEL].any():
        return rest, elementrefs, [f"left out '{IN_MODEL}' of the model, which is zero for all elements"]
    scale = normalizers[ENERGY]["rmsd"].double() if ENERGY in normalizers else torch.tensor(1.0).double()
    references = (weights[IN_MODEL].double() * scale).float()
    held = elementrefs.get(ENERGY)
    if held is None:
        elementrefs[ENERGY] = {_IN_CHECKPOINT: references}
        count = int((references != 0).sum())
        return (
            rest,
            elementrefs,
            [
                f"turned '{IN_MODEL}' of the model into element references of the checkpoint, for {count} "
                f"elements and times the rmsd of the energies, {float(scale):.6g}: predictions are total "
                "energies"
            ],
        )
    both = min(len(references), len(held[_IN_CHECKPOINT]))
    if not torch.allclose(references[:both], held[_IN_CHECKPOINT][:both].float(), rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"The model holds references per element ('{IN_MODEL}') and the checkpoint holds others "
            "('elementrefs'): it cannot be told which of them its energies lack."
        )
    return (
        rest,
        elementrefs,
        [f"left out '{IN_MODEL}' of the model, which the checkpoint's references repeat"],
    )
