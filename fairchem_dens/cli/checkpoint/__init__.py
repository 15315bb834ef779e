"""`fairchem-dens checkpoint`: look into checkpoints and bring them from one layout to another."""

from __future__ import annotations

COMMANDS = {
    "info": (
        "fairchem_dens.cli.checkpoint.info",
        "say what is in a checkpoint and what a run can do with it",
    ),
    "import": (
        "fairchem_dens.cli.checkpoint.import_",
        "turn a checkpoint of the authors' code or of fairchem into one of this package",
    ),
    "export": (
        "fairchem_dens.cli.checkpoint.export",
        "turn a checkpoint into backbone and heads, which stock fairchem-core 1.10.0 loads",
    ),
    "strip": (
        "fairchem_dens.cli.checkpoint.strip",
        "leave DeNS out: a plain EquiformerV2 or eSCN of fairchem that predicts exactly the same",
    ),
}
