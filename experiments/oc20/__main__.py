"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.command import main
from experiments.common.experiment import Experiment
from experiments.oc20.figures import draw, tell
from experiments.oc20.runs import make_equal_time_runs, make_runs

EXPERIMENT = Experiment(
    name="oc20",
    source=Path(__file__).parent,
    phases=(make_runs, make_equal_time_runs),
    draw=draw,
    tell=tell,
    alts={
        "oc20": "learning curves on OC20 over steps and over time: baseline, DeNS and ablations",
    },
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
