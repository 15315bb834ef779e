"""fairchem-core 1.10.0's own loss of DeNS, computed on our trainer's settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fairchem.core.models.equiformer_v2.trainers.dens_trainer import (
    DenoisingForcesTrainer,
    DenoisingPosParams,
)
from fairchem.core.modules.normalization.normalizer import Normalizer

STD = 0.1


def fairchem_loss(trainer: Any, out: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """fairchem's method, unchanged, on our trainer's settings."""
    itself = SimpleNamespace(
        loss_functions=trainer.loss_functions,
        output_targets=trainer.output_targets,
        elementrefs={},
        normalizers={**trainer.normalizers, "denoising_pos_target": Normalizer(mean=0.0, rmsd=STD)},
        denoising_pos_params=DenoisingPosParams(
            prob=0.5,
            fixed_noise_std=True,
            std=STD,
            corrupt_ratio=0.5,
            denoising_pos_coefficient=trainer.noise_loss.coefficient,
        ),
    )
    return DenoisingForcesTrainer._compute_loss(itself, out, batch)
