"""Kills training runs at random and compares their ends with undisturbed ones.

    python -m tests.faults --kills 50 --out tests/faults/results/campaign.json

Runs of a tiny model with DeNS, on CPU, with 0 and 2 loader workers and with both kinds of coins. Each process
is killed with SIGKILL in a step, while a checkpoint is written, in an evaluation, at any other moment, or by
the loss of a loader worker; then the same `fairchem` command is given again. The exit status is 1 if one of
its checkpoints was lost or could not be read, if a run did not end with exactly the weights, averages,
optimizer state and predictions of the undisturbed run, if one hung, or if a process was left behind.

What is drawn depends on --seed alone: the same seed aims the same strikes. The moments of those that come
from outside still depend on how fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from fairchem_dens.progress import progress_bar
from tests.conftest import small_data, small_model, small_run

from .campaign import Campaign
from .machine import environment


def main() -> int:
    """Run a campaign, print what was found, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument(
        "--spawned", type=int, default=6,
        help="how many of them hit a new `fairchem` instead of a forked one (default: 6)",
    )  # fmt: skip
    parser.add_argument(
        "--per-run", type=int, default=5, help="kills of one run before it may end (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="what is drawn depends on it alone (default: 0)")
    parser.add_argument(
        "--folder", type=Path, help="new folder to keep all runs in (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    print(f"seed {args.seed}: {args.kills} kills, {args.spawned} of them of a spawned command", flush=True)
    with ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder.mkdir(parents=True)
        folder = folder.resolve()
        settings = small_run(small_data(folder / "lmdb"), small_model())
        bar = stack.enter_context(progress_bar(total=args.kills, desc="kills", unit="kill"))
        begun = time.monotonic()
        campaign = Campaign(folder, settings, seed=args.seed, done=bar.update)
        tally = campaign.run(args.kills, spawned=args.spawned, per_run=args.per_run)
        report = {
            "campaign": "faults", **environment(), "seed": args.seed,
            "minutes": round((time.monotonic() - begun) / 60, 1), **tally.report(),
        }  # fmt: skip
    for key, value in report.items():
        if key not in ("each", "versions"):
            print(f"{key}: {value}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if tally.problems() or len(tally.kills) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
