"""Force-conditioned models, under the names that configurations and checkpoints use.

Models never import the trainer. They take the flat arguments and have the parameter names of the paper's own
code.
"""

from __future__ import annotations

from fairchem_dens.models.equiformer import EquiformerDeNS
from fairchem_dens.models.equiformer_v2 import EquiformerV2DeNS
from fairchem_dens.models.escn import ESCNDeNS

__all__ = ["ESCNDeNS", "EquiformerDeNS", "EquiformerV2DeNS"]
