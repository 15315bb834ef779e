"""Imported by fairchem's `setup_imports`, because `.include` beside this folder lists it."""

from __future__ import annotations

import fairchem_dens.register
