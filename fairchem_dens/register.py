"""The one place where names enter fairchem: importing this registers trainer, model, data set and transform.

fairchem imports it by itself, through the file that our wheel puts into fairchem's extension folder; the
trainer imports it too, for installations where that folder is not seen.
"""

from __future__ import annotations

from fairchem.core.common.registry import registry
from fairchem.core.modules import transforms as fairchem_transforms

import fairchem_dens
from fairchem_dens.data.dens_lmdb import DeNSLmdbDataset
from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS, ESCNDeNS
from fairchem_dens.trainer import DeNSTrainer
from fairchem_dens.training.loggers import NoLogger
from fairchem_dens.transforms import dens

for _name in ("dens", "denoising_forces"):
    registry.register_trainer(_name)(DeNSTrainer)
registry.register_model("equiformer_v2_dens")(EquiformerV2DeNS)
registry.register_model("escn_dens")(ESCNDeNS)
registry.register_model("equiformer_dens")(EquiformerDeNS)
registry.register_logger("none")(NoLogger)
registry.register_dataset("dens_lmdb")(DeNSLmdbDataset)

# fairchem has no registry of transforms: it evaluates the YAML key as an expression in this module.
fairchem_transforms.dens = dens  # type: ignore[attr-defined]  # a name that the module does not declare
fairchem_transforms.fairchem_dens = fairchem_dens  # type: ignore[attr-defined]
