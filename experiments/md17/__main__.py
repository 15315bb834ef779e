"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.command import main
from experiments.common.experiment import Experiment
from experiments.md17.figures import draw, tell
from experiments.md17.runs import make_runs

EXPERIMENT = Experiment(
    name="md17",
    source=Path(__file__).parent,
    phases=(make_runs,),
    draw=draw,
    tell=tell,
    alts={
        "md17": "learning curves on ethanol and aspirin over epochs and over time, with and without DeNS",
    },
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
