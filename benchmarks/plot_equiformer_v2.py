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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common.figures import BLUE, GREEN, INK, PURPLE, RED, new_figure, save

AXES = {
    "structures": "structures",
    "natoms": "atoms of a structure",
    "neighbors": "neighbours of an atom",
    "layers": "layers",
    "lmax": "largest degree L",
}
COLORS = (INK, BLUE, RED, GREEN, PURPLE)
MARKERS = "soD^v"
DASHES = ("--", "-", "-.", ":", "-")


def draw(result: dict[str, Any], along: str, out: Path) -> None:
    """Draw one figure of two panels.

    Args:
        result: what `equiformer_v2.py` wrote.
        along: one of `AXES`.
        out: SVG to write.
    """
    rows = result["rows"]
    same = {axis: rows[0][axis] for axis in AXES if axis != along and len({row[axis] for row in rows}) == 1}
    varied = [key for key in ("precision", "mode") if len({row[key] for row in rows}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join([row["variant"], *(row[key] for key in varied)]), []).append(row)
    figure, axes = new_figure(1, 2, width=9, height=3.6)
    panels = axes[0]
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
    save(figure, out)


def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of equiformer_v2.py")
    parser.add_argument("--along", choices=AXES, default="natoms")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    args = parser.parse_args()
    if args.out.suffix != ".svg":
        parser.error(f"--out must end in .svg, found '{args.out}'")
    draw(json.loads(args.results.read_text()), args.along, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
