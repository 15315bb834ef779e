"""`fairchem-dens data`: make data sets, look at them, and fit their normalisers."""

from __future__ import annotations

COMMANDS = {
    "check": (
        "fairchem_dens.cli.data.check",
        "open a data set as training does and say what is in it",
    ),
    "fit-stats": (
        "fairchem_dens.cli.data.fit_stats",
        "fit normalisers and element references to a data set, for inclusion in a YAML",
    ),
    "from-ase": (
        "fairchem_dens.cli.data.from_ase",
        "turn trajectories and other files that ASE reads into train, val and test LMDBs",
    ),
    "md17": (
        "fairchem_dens.cli.data.md17",
        "make the LMDBs of a molecule of MD17 or revised MD17, split as in the paper",
    ),
    "references": (
        "fairchem_dens.cli.data.references",
        "convert per-element linear references, refusing what the data cannot use",
    ),
}
