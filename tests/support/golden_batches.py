"""Our models and batches for the files in which outputs of the authors' code are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data


def with_weights(model: type[Any], file: dict[str, Any], **settings: Any) -> nn.Module:
    """A model of ours with their weights, in evaluation mode; ``settings`` are beside those of the file."""
    built: nn.Module = model(**file["config"], **settings).eval()
    built.load_state_dict(file["state_dict"], strict=True)
    return built


def batch_in(mode: str, file: dict[str, Any]) -> tuple[Data, Tensor]:
    """Our batch for one of their modes, and the atoms whose 'force' was the output of their noise head."""
    theirs = file["batch"]
    batch = Data(**{name: theirs[name] for name in ("cell", "pbc", "atomic_numbers", "natoms", "batch")})
    if mode == "s2ef":
        batch.pos = file["clean_pos"]
        return batch, torch.zeros(len(batch.pos), dtype=torch.bool)
    mask = theirs["noise_mask"] if mode == "dens_partial" else torch.ones_like(theirs["noise_mask"])
    batch.pos, batch.noise_mask = theirs["pos"], mask
    batch.condition_forces = theirs["forces"] * mask[:, None]
    batch.corrupted = torch.ones(len(batch.natoms), dtype=torch.bool)
    if "sigmas" in theirs:
        batch.sigmas = theirs["sigmas"]
    return batch, mask


def merged(outputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """As the authors return them: the noise head's output in place of the force where ``mask`` is True."""
    forces = torch.where(mask[:, None], outputs.get("noise", outputs["forces"]), outputs["forces"])
    return {"energy": outputs["energy"], "forces": forces}
