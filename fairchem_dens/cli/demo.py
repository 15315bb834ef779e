"""`fairchem-dens demo`: generate a small data set, train with and without DeNS on it, and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    from fairchem_dens.demo.plan import BUDGETS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Generate a small OC20-like data set, train EquiformerV2 without and with DeNS on it with the\n"
        "fairchem command, compare the two, and leave table, pictures, predictions and commands in one\n"
        "folder. "
        "A demo that was cut off goes on where it was when the same command is given again.\n"
        "\nbudgets:\n" + "\n".join(f"  {name:8} {budget.says}" for name, budget in BUDGETS.items())
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="where everything goes (default: demo-output)",
    )
    parser.add_argument(
        "--budget",
        choices=list(BUDGETS),
        default="default",
        help="how much to compute (default: default)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of data, weights, order and noise (default: 1)")
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the budget's")
    parser.add_argument("--train-frames", type=int, metavar="N", help="instead of the budget's")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    device.add_argument("--gpu", action="store_true", help="use the GPU (default: if there is one)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0, 1 after a failed command, or 130 if it was interrupted."""
    import warnings

    # fairchem reads tables of its own with torch.load: nothing that a user of the demo could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairchem\.core")

    import torch

    from fairchem_dens.demo.main import run_demo
    from fairchem_dens.demo.plan import Folder, Settings
    from fairchem_dens.demo.runner import StageError

    available = torch.cuda.is_available()
    if args.gpu and not available:
        raise ValueError("'--gpu' was given but torch sees no GPU: leave it out to run on the CPU.")
    settings = Settings.make(
        budget=args.budget,
        seed=args.seed,
        epochs=args.epochs,
        train_frames=args.train_frames,
        cpu=args.cpu or not available,
    )
    try:
        run_demo(Folder(args.out), settings)
    except StageError as error:
        print(f"\n{error}\n\nThe same `fairchem-dens demo` command goes on from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0
