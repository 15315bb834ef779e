"""The benchmark of reading: its command, what it writes, and that its variants do the same work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmark_scripts import BENCHMARKS, only_in_a_checkout, run_benchmark

SCRIPT = "reading.py"

pytestmark = only_in_a_checkout


@pytest.fixture(scope="module")
def reading() -> ModuleType:
    specification = importlib.util.spec_from_file_location("reading_benchmark", BENCHMARKS / SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    assert "--structures" in run_benchmark(SCRIPT, "--help", cwd=tmp_path)
    out = tmp_path / "results" / "reading.json"
    printed = run_benchmark(
        SCRIPT, "--structures", "12", "--natoms", "10", "--rounds", "2", "--workers", "0", "1",
        "--out", str(out), cwd=tmp_path,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert {"python", "torch", "numpy", "fairchem-core", "fairchem_dens"} <= set(result["versions"])
    rows = result["rows"]
    assert len(printed.splitlines()) == len(rows) == 16
    for row in rows:
        assert row["structures_per_second"] > 0 and row["faster_than_fairchem"] > 0
        assert ("corruption_us" in row) == ("corrupted" in row["variant"])
    assert [row["faster_than_fairchem"] for row in rows if row["variant"] == "fairchem"] == [1.0, 1.0]


def test_all_variants_read_the_same(reading: ModuleType, tmp_path: Path) -> None:
    reading.write_structures(tmp_path / "set", 10, 8)
    compared = reading.variants(str(tmp_path / "set"), 4, 0)
    first = list(compared["fairchem"].loader)
    assert len(first) == 3
    for name, variant in compared.items():
        batches = list(variant.loader)
        corrupted = sum(int(batch.corrupted.sum()) for batch in batches if "corrupted" in batch)
        assert (corrupted > 0) == ("corrupted" in name and "by batch" not in name)
        for one, other in zip(batches, first, strict=True):
            assert torch.equal(one.forces, other.forces) and one.sid.tolist() == other.sid.tolist()
            assert ("noise_vec" in one) == ("corrupted" in name)
        assert variant.seconds() > 0


def test_ratios_are_taken_round_by_round(reading: ModuleType) -> None:
    """A round in which the machine was twice as slow changes nothing."""
    assert reading.median_ratio([1.0, 2.0, 1.0], [2.0, 4.0, 2.0]) == 0.5
