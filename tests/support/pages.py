"""The commands in the documentation, and what is said about each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from checkout import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?:bash|sh|console)\n(?P<code>.*?)^```$", flags=re.M | re.S
)


@dataclass(frozen=True)
class Commands:
    """A block of shell commands.

    Attributes:
        page: where it stands.
        mark: the comment above it: ``run``, ``run by: TEST``, ``not run: REASON``, or None.
        code: the commands.
    """

    page: Path
    mark: str | None
    code: str


def commands(page: Path) -> list[Commands]:
    """Return the blocks of a page, in order."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Commands(page, match["mark"], match["code"]) for match in found]
