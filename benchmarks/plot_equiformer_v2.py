"""Plot what `equiformer_v2.py` wrote: time and peak memory along one axis, a line for each variant.

python benchmarks/plot_equiformer_v2.py benchmarks/results/x.json --along natoms --out x.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of equiformer_v2.py")
    axes = ("structures", "natoms", "neighbors", "layers", "lmax")
    parser.add_argument("--along", choices=axes, default="natoms")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())["rows"]
    figure, (of_time, of_memory) = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    lines: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        lines.setdefault(f"{row['variant']}, {row['precision']}, {row['mode']}", []).append(row)
    for name, points in lines.items():
        along = [point[args.along] for point in points]
        of_time.plot(along, [point["ms"] for point in points], "o-", label=name)
        of_memory.plot(along, [point["peak_MiB"] for point in points], "o-")
    for axis, label in ((of_time, "ms"), (of_memory, "MiB at most")):
        axis.set(xlabel=args.along, ylabel=label, ylim=(0, None))
    of_time.legend(fontsize=7)
    figure.savefig(args.out, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
