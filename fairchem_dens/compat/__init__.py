"""Stand-ins for modules that fairchem-core 1.10.0 imports and that a machine without a compiler lacks.

fairchem-core imports torch_scatter and torch_sparse without declaring them, and needs torch_cluster for
graphs without periodicity; all three are source builds of minutes. Importing this package appends one finder
to the end of `sys.meta_path`. Python asks finders in order, so the finder is reached only for modules that
nothing else provides, and a real installation always wins.

The installed package does this at interpreter start-up (a `.pth` line), so DataLoader workers, torchrun
children and submitted jobs have it without calling anything. That is why this file imports nothing but `sys`,
not even `typing`, and what answers a request is loaded on the first request.
"""

import sys

STAND_INS = ("torch_scatter", "torch_sparse", "torch_cluster")
"""Top-level modules that are answered for when they are missing."""


class StandInFinder:
    """Answers `import torch_scatter` and its like when no other finder could."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # see above
        """Returns the spec of the stand-in for `fullname`, or None if it is not ours to answer for."""
        if fullname not in STAND_INS:
            return None
        from fairchem_dens.compat.finder import find_stand_in

        return find_stand_in(fullname)


def install() -> None:
    """Appends the finder to `sys.meta_path`, once."""
    if StandInFinder not in sys.meta_path:
        sys.meta_path.append(StandInFinder)


install()
