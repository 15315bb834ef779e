"""State dicts of the paper's Equiformer: parameters, and what e3nn's generated code leaves among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_GENERATED = (".output_mask", "._w3j_")
"""Parts of the names of constants of e3nn's tensor products."""
_EMPTY = ("tp.weight", "mul.weight")
"""Ends of the names of tensor products that hold no weights; others of these names do."""


class WithoutGeneratedBuffers(nn.Module):
    """Base of models that hold parameters only and read files with e3nn's constants and a radial basis."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch hands the whole dict to each module before its children; what is deleted here no child sees.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, value = key.removeprefix(prefix), state_dict[key]
            if name.startswith("rbf."):
                self._check_basis(name, state_dict.pop(key))
            elif (
                any(part in name for part in _GENERATED)
                or (name.endswith(_EMPTY) and not value.numel())
                or name == "atomref"
            ):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_basis(self, name: str, theirs: Tensor) -> None:
        basis: Any = self.rbf
        expected = {"rbf.means": basis.means, "rbf.betas": torch.full_like(basis.means, basis.beta)}.get(name)
        if expected is None:
            return
        if theirs.shape != expected.shape or not torch.allclose(theirs.to(expected), expected, rtol=1e-4):
            raise ValueError(
                f"The checkpoint's constant '{name}' is not this model's: the two were built with different "
                "settings ('number_of_basis' or 'max_radius')."
            )
