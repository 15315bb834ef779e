"""Stand-in for torch_sparse: importable, without function.

fairchem-core imports `SparseTensor` at the top of GemNet and DimeNet++, and importing any fairchem model
imports them all. Those models need the real package to run; nothing that this project trains does.
"""

from __future__ import annotations

from fairchem_dens.compat.absent import absent_class, absent_function

__version__ = "0+fairchem.dens"

SparseTensor = absent_class("torch-sparse", "SparseTensor")
SparseStorage = absent_class("torch-sparse", "SparseStorage")


def __getattr__(name: str) -> object:
    # Any function of the package, so that `from torch_sparse import coalesce` does not fail where it is never
    # called.
    if name.startswith("_"):
        raise AttributeError(f"module 'torch_sparse' has no attribute {name!r}")
    return absent_function("torch-sparse", name)
