"""Equiformer with DeNS: forces are the gradient of the energy."""

from __future__ import annotations

from fairchem_dens.models.equiformer.model import EquiformerDeNS

__all__ = ["EquiformerDeNS"]
