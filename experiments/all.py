"""All experiments one after the other, then the pages that quote them.

    python -m experiments.all --quick --record --data REAL_DATA

Takes the options of each. What was finished before is not run again.
"""

from __future__ import annotations

import importlib
import sys

from experiments.common.command import main
from experiments.tables import NAMES, fill_pages

if __name__ == "__main__":
    failed = [
        name
        for name in NAMES
        if main(importlib.import_module(f"experiments.{name}.__main__").EXPERIMENT, sys.argv[1:]) != 0
    ]
    fill_pages()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
