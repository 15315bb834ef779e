"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.experiment import Experiment, main
from experiments.md17.figures import draw, tell
from experiments.md17.runs import make_runs

EXPERIMENT = Experiment(name="md17", source=Path(__file__).parent, phases=[make_runs], draw=draw, tell=tell)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
