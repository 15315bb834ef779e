"""EquiformerV2 (arXiv 2306.12059) with DeNS."""

from __future__ import annotations

from fairchem_dens.models.equiformer_v2.model import EquiformerV2DeNS

__all__ = ["EquiformerV2DeNS"]
