"""The command of this experiment."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common.experiment import Experiment, main
from experiments.generated.figures import draw, tell
from experiments.generated.runs import make_runs

EXPERIMENT = Experiment(
    name="generated", source=Path(__file__).parent, phases=[make_runs], draw=draw, tell=tell
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
