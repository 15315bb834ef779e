"""`fairchem-dens submission`: build and check files for the OC20 and OC22 leaderboards."""

from __future__ import annotations

COMMANDS = {
    "check": (
        "fairchem_dens.cli.submission.check",
        "check a file from anywhere before it is uploaded",
    ),
    "is2re": (
        "fairchem_dens.cli.submission.is2re",
        "build a file of relaxed energies",
    ),
    "is2rs": (
        "fairchem_dens.cli.submission.is2rs",
        "build a file of relaxed structures",
    ),
    "s2ef": (
        "fairchem_dens.cli.submission.s2ef",
        "build a file of energies and forces",
    ),
}
