"""Gives `fairchem.core.modules.transforms` the name `dens`.

That module evaluates the YAML keys below `transforms` as names of its own, has no registry, and imports
everything from this path if it exists. A DataLoader worker that is spawned rather than forked unpickles its
data set in a fresh interpreter and never calls `setup_imports`; it does import that module, and so finds
`dens` here. The name of the package is handed over too, for YAMLs that write `fairchem_dens.transforms.dens`.

It is also the one file of ours that fairchem imports whenever it is itself imported, so the mends of its
launcher are put in place here: a submitted job needs them before it calls `setup_imports`.

An ImportError in here would be swallowed there. What is imported below imports nothing of fairchem but two
modules that are complete, or import nothing of it, by then, so there is no circle to cause one.
"""

from __future__ import annotations

import fairchem_dens
import fairchem_dens.transforms
from fairchem_dens.launch.mends import mend
from fairchem_dens.transforms import dens

mend()

__all__ = ["dens", "fairchem_dens"]
