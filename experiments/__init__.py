"""Does DeNS help? Four experiments, each a command: ``python -m experiments.NAME --quick``. See README.md."""
