"""`fairchem --mode predict` on two ranks: each structure once, with the numbers of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_geometric.data import Data

# Seven structures and batches of two: the ranks get four each, one of them a second time.
SIZES = (9, 14, 5, 12, 8, 13, 6)


@pytest.fixture
def seven(tmp_path: Path, structure: Callable[..., Data], write_lmdb: Callable[..., Path]) -> Path:
    """Without labels, which predictions do not need."""
    structures = [structure(400 + place, natoms=natoms) for place, natoms in enumerate(SIZES)]
    for data in structures:
        del data.energy, data.forces
    return write_lmdb(tmp_path / "seven", structures, labels=False)


@pytest.mark.parametrize(
    "balanced", [pytest.param(False, id="as they come"), pytest.param(True, marks=pytest.mark.slow)]
)
def test_two_ranks_predict_as_one(
    fairchem: Any, run_settings: dict[str, Any], trained: Path, seven: Path, balanced: bool
) -> None:
    run_settings["dataset"]["test"]["src"] = str(seven)
    run_settings["task"] = {"prediction_dtype": "float32"}
    run_settings["optim"] |= {"eval_batch_size": 2}
    if balanced:
        run_settings["optim"]["load_balancing"] = "atoms"
    for ranks in ("1", "2"):
        arguments = ("--checkpoint", str(trained), "--num-gpus", ranks)
        said = fairchem("predict", run_settings, *arguments, name=ranks)
        assert ("device 1:" in said) is (ranks == "2")
    one, two = (fairchem.results(ranks) for ranks in ("1", "2"))
    assert one["ids"].tolist() == [f"{400 + place}_0" for place in range(7)]
    assert one.keys() == two.keys() == {"ids", "energy", "forces", "chunk_idx"}
    for name in ("ids", "chunk_idx"):
        assert np.array_equal(one[name], two[name])
    assert len(one["forces"]) == sum(natoms - 4 for natoms in SIZES)  # the free atoms
    assert one["energy"].std() > 1e-3 and np.abs(one["forces"]).max() > 1e-3
    for name in ("energy", "forces"):
        # Other batches, hence sums in another order; float32.
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
