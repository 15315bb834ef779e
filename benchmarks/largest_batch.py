"""How many structures of a training step fit into a GPU's memory, with fairchem's EquiformerV2 and ours.

    python benchmarks/largest_batch.py --precisions fp32 bf16 --gib 80 --out benchmarks/results/x.json

Steps with twice as many structures each time, until one does not fit; then the number in between is searched,
to an eighth of it. A step is a forward and a backward pass; moments of the optimizer are held, too.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.utils import load_config
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from equiformer_v2 import STOCK, Variant
from result_file import describe, write
from stock_model import StockModel
from training_step import CONFIG, PRECISIONS, make_batch

from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.equiformer_v2 import memory
from fairchem_dens.shipped import configs_folder


def fits(model: nn.Module, args: argparse.Namespace, precision: str, structures: int) -> bool:
    """Tell whether a step of so many structures goes through."""
    noise = Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5)
    batch = corrupt(make_batch(structures, args.natoms), noise, seed=0, epoch=0, selected=True)
    held: list[Any] = []
    try:
        held.append(copy.deepcopy(model).to(args.device))
        held.append(Variant(held[0], batch.to(args.device), "training", precision))
        held.append([torch.zeros_like(one) for one in held[0].parameters() for _ in range(2)])
        held[1]()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        held.clear()
        torch.cuda.empty_cache()
    return True


def largest(model: nn.Module, args: argparse.Namespace, precision: str) -> int:
    """Return the largest number of structures that fits, to an eighth."""
    low, high = 0, args.start
    while high <= args.most and fits(model, args, precision, high):
        low, high = high, 2 * high
    if high > args.most:
        return low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(model, args, precision, middle) else (low, middle)
    return low


def main() -> int:
    """Search, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--natoms", type=int, default=80, help="of a structure (default: 80)")
    parser.add_argument("--layers", type=int, help="instead of the configuration's 12")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--recompute", choices=memory.LEVELS, default="activations")
    parser.add_argument("--gib", type=float, help="pretend that the GPU has no more memory than this")
    parser.add_argument("--start", type=int, default=8, help="structures to begin with (default: 8)")
    parser.add_argument("--most", type=int, default=512, help="structures at most (default: 512)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    if args.gib:
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib * 2**30 / total))
    settings = load_config(str(configs_folder() / CONFIG))[0]["model"]
    settings |= {"num_layers": args.layers or settings["num_layers"], "recompute": args.recompute}
    settings.pop("name", None)
    ours = EquiformerV2DeNS(**settings)
    models = {"ours": ours, STOCK: StockModel(settings, ours)}
    options = {key: value for key, value in vars(args).items() if key != "out"}
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "largest_batch", **describe(args.device), "settings": options, "rows": rows}
    for precision in args.precisions:
        for name, one in models.items():
            found = largest(one, args, precision)
            rows.append({"variant": name, "precision": precision, "structures": found})
            print(rows[-1], flush=True)
            if args.out:  # after each, in case that there is no time for all
                write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
