"""DeNS for fairchem-core 1.10: force fields trained by denoising non-equilibrium structures.

This file stays free of imports: the start-up line of the installed package loads it in every Python process
of the environment, and the build reads the version from it.
"""

__version__ = "0.1.0"
