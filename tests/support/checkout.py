"""Imports what lies in the checkout and is not installed: `experiments`, and the script of the docs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def see_experiments() -> None:
    """Let `experiments` and `examples` be imported, from the end of the path: nothing is shadowed."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))


def load_script(file: Path) -> ModuleType:
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
