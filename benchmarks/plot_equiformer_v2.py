"""Plot what `equiformer_v2.py` wrote: time and peak memory along one axis, a line for each variant.

python benchmarks/plot_equiformer_v2.py benchmarks/results/x.json --along natoms --out x.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

AXES = {
    "structures": "structures",
    "natoms": "atoms of a structure",
    "neighbors": "neighbours of an atom",
    "layers": "layers",
    "lmax": "largest degree L",
}
COLORS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Those of Okabe and Ito, which colour-blind people can tell apart."""
MARKERS = "soD^v"
DASHES = ("--", "-", "-.", ":", "-")


def draw(result: dict[str, Any], along: str, out: Path) -> None:
    """Draw one figure of two panels.

    Args:
        result: what `equiformer_v2.py` wrote.
        along: one of `AXES`.
        out: file to write, in the format of its suffix.
    """
    rows = result["rows"]
    same = {axis: rows[0][axis] for axis in AXES if axis != along and len({row[axis] for row in rows}) == 1}
    varied = [key for key in ("precision", "mode") if len({row[key] for row in rows}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join([row["variant"], *(row[key] for key in varied)]), []).append(row)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    styles = cycle(zip(COLORS, MARKERS, DASHES, strict=True))
    for (name, points), (color, marker, dashes) in zip(lines.items(), styles, strict=False):
        for panel, key, factor in zip(panels, ("ms", "peak_MiB"), (1e-3, 1 / 1024), strict=True):
            panel.plot(
                [point[along] for point in points], [factor * point[key] for point in points],
                color=color, marker=marker, linestyle=dashes, label=name,
            )  # fmt: skip
    for panel, label in zip(panels, ("time of a call, s", "peak memory beyond weights, GiB"), strict=True):
        panel.set(xlabel=AXES[along], ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    about = ", ".join(f"{AXES[axis]}: {value}" for axis, value in same.items())
    figure.suptitle(f"{about}. {result['device']}", fontsize=8)
    # Without a date and with fixed names, so that the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "fairchem_dens"}):
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of equiformer_v2.py")
    parser.add_argument("--along", choices=AXES, default="natoms")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.along, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
