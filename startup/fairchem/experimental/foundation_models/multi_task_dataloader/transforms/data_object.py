"""Gives `fairchem.core.modules.transforms` the name `dens`.

That module evaluates the YAML keys below `transforms` as names of its own, has no registry, and imports
everything from this path if it exists. A DataLoader worker that is spawned rather than forked unpickles its
data set in a fresh interpreter and never calls `setup_imports`; it does import that module, and so finds
`dens` here. The name of the package is handed over too, for YAMLs that write `fairchem_dens.transforms.dens`.

An ImportError in here would be swallowed there. Nothing that is imported below imports fairchem, so there is
no circle to cause one.
"""

from __future__ import annotations

import fairchem_dens
import fairchem_dens.transforms
from fairchem_dens.transforms import dens

__all__ = ["dens", "fairchem_dens"]
