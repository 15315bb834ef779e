"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.command import main
from experiments.common.experiment import Experiment
from experiments.denoising.figures import draw, tell
from experiments.denoising.runs import make_runs

EXPERIMENT = Experiment(
    name="denoising",
    source=Path(__file__).parent,
    phases=(make_runs,),
    draw=draw,
    tell=tell,
    alts={
        "denoising": "error of the predicted noise by σ and by force, forces shown and hidden",
    },
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
