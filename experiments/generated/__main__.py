"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.command import main
from experiments.common.experiment import Experiment
from experiments.generated.figures import draw, tell
from experiments.generated.runs import make_runs

EXPERIMENT = Experiment(
    name="generated",
    source=Path(__file__).parent,
    phases=(make_runs,),
    draw=draw,
    tell=tell,
    alts={
        "generated_sizes": "errors against the number of training frames, with and without DeNS",
        "generated_sweep": "change of the errors with each setting of DeNS",
    },
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
