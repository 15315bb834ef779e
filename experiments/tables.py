"""Put the kept results of the experiments into the pages that quote them.

    python -m experiments.tables

A page marks the places with ``<!-- results NAME SCALE -->`` and ``<!-- end -->``; what is between them is
replaced.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from experiments.common.experiment import section

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "experiments.md",)
NAMES = ("generated", "denoising", "md17", "oc20")
_PLACE = re.compile(r"(<!-- results (\w+) (quick|full) -->\n).*?(<!-- end -->)", flags=re.S)


def filled(text: str) -> str:
    """Return a page with its results as they are kept now."""

    def fill(match: re.Match[str]) -> str:
        experiment = importlib.import_module(f"experiments.{match[2]}.__main__").EXPERIMENT
        return f"{match[1]}\n{section(experiment, match[3])}\n\n{match[4]}"

    return _PLACE.sub(fill, text)


def fill_pages() -> None:
    """Write the pages anew."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page}")


if __name__ == "__main__":
    fill_pages()
