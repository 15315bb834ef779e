"""The benchmark of EquiformerV2: its command, what it writes, the plot of it, and what it compares with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_scripts import BENCHMARKS, only_in_a_checkout, run_benchmark
from fairchem_dens import keys
from fairchem_dens.models import EquiformerV2DeNS
from structures import partly_corrupted

pytestmark = only_in_a_checkout


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    sizes = ("--device", "cpu", "--layers", "1", "--lmax", "2", "--structures", "1", "--natoms", "4", "8")
    printed = run_benchmark(
        "equiformer_v2.py", *sizes, "--modes", "training", "inference", "--recompute", "none", "layers",
        "--rounds", "1", "--warm-up", "0", "--errors", "--out", "x.json", cwd=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "x.json").read_text())
    assert {"python", "torch", "fairchem-core", "fairchem_dens"} <= set(result["versions"])
    rows = result["rows"]
    assert len(rows) == 12 and printed.count("\n") == 14
    assert (tmp_path / "x.md").read_text() == printed
    for row in rows:
        assert row["ms"] > 0 and row["peak_MiB"] > 0 and row["kernels"] > 0
        assert 0 < row["error_of_outputs"] < 1e-4 and 0 < row["error_of_gradients"] < 1e-4
    stock = [row for row in rows if row["variant"] == "fairchem"]
    assert len(stock) == 4 and all(row["faster"] == row["leaner"] == 1 for row in stock)
    run_benchmark("plot_equiformer_v2.py", "x.json", "--along", "natoms", "--out", "x.svg", cwd=tmp_path)
    assert "svg" in (tmp_path / "x.svg").read_text()


def test_what_it_compares_with(
    model_settings: dict[str, Any], structure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairchem's backbone and heads have our weights, and see what ours see."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from stock_model import StockModel
    from torch_geometric.data import Batch

    batch = partly_corrupted(Batch.from_data_list([structure(0), structure(1, natoms=7)]))
    torch.manual_seed(0)
    ours = EquiformerV2DeNS(**model_settings).eval()
    stock = StockModel(model_settings, ours).eval()
    with torch.no_grad():
        expected, found = ours(batch), stock(batch)
    merged = torch.where(batch[keys.NOISE_MASK].view(-1, 1), expected[keys.NOISE], expected[keys.FORCES])
    # Frames of edges are rolled at random there, which the grid of the activation does not bear exactly.
    torch.testing.assert_close(found[keys.ENERGY], expected[keys.ENERGY], rtol=0.02, atol=1e-4)
    assert (found[keys.FORCES] - merged).norm() < 0.02 * merged.norm()
    assert found[keys.NOISE] is found[keys.FORCES]
