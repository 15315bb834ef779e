"""docs/clusters.md: its command for a dry run, its settings for SLURM and its sweep, as they stand there."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairchem_dens.cli.main import main
from fairchem_dens.launch import mends
from fairchem_dens.shipped import configs_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"


@pytest.fixture(autouse=True)
def _where_the_page_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder that holds `configs`, with data; fairchem's `main` adds handlers to the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.chdir(configs_folder().parent)
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(tmp_path))
    mends.mend()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def command() -> list[str]:
    """The first one of the page, without the name of the program."""
    program, *arguments = shlex.split(blocks("bash")[0].replace("\\\n", " "))
    assert program == "fairchem-dens" and arguments[:2] == ["submit", "--dry-run"]
    return arguments


def test_dry_run(capsys: Any) -> None:
    assert main(command()) == 0
    said = capsys.readouterr()
    assert "batch   2 nodes × 8 GPUs × 4 structures = 64\n        the YAML was written for 64\n" in said.out
    assert "#SBATCH --partition=PARTITION\n" in said.out and "warning" not in said.err


def test_settings_of_slurm(capsys: Any) -> None:
    settings = yaml.safe_load(next(block for block in blocks("yaml") if block.startswith("slurm:")))
    assert main([*command(), *(f"--slurm.{key}={value}" for key, value in settings["slurm"].items())]) == 0
    script = capsys.readouterr().out
    for key, value in settings["slurm"].items():
        assert f"#SBATCH --{key}={value}\n" in script


def test_sweep(capsys: Any, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yml"
    sweep.write_text(next(block for block in blocks("yaml") if "sweep.yml" in block))
    assert main([*command(), "--sweep-yml", str(sweep)]) == 0
    assert "#SBATCH --array=0-1%2\n" in capsys.readouterr().out
