"""The demo as a user runs it; minutes, hence slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fairchem_dens.data.lmdb import read_lmdb

pytestmark = pytest.mark.slow

OPTIONS = ("--budget", "ci", "--epochs", "6", "--train-frames", "40", "--cpu")


def start(out):
    return subprocess.Popen(
        [sys.executable, "-m", "fairchem_dens.cli.main", "demo", "--out", str(out), *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def numbers(out):
    """What was measured, without what depends on the machine's mood."""
    found = json.loads((out / "results.json").read_text())
    for run in ("baseline", "dens"):
        # NaN where the run was killed before a process had printed two steps.
        assert not found[run].pop("train_seconds") <= 0
    return found


def wait_for(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "demo"
    return out, finish(start(out))


def test_folder_holds_all_that_was_promised(undisturbed):
    out, output = undisturbed
    for name in ("report.md", "curves.png", "structure.png", "commands.txt", "results.json"):
        assert (out / name).stat().st_size > 500, name
        assert name in output or name == "results.json"
    assert "val: denoising MAE" in output and "val: denoising MAE" in (out / "report.md").read_text()
    for split in ("train", "val", "test"):
        assert (out / "data" / split / "metadata.npz").is_file()
    expected = sorted(f"{data.sid}_{data.fid}" for data in read_lmdb(out / "data" / "test"))
    for run in ("baseline", "dens"):
        with np.load(out / "predictions" / f"{run}_s2ef_predictions.npz") as predictions:
            assert sorted(predictions["ids"].tolist()) == expected
            assert predictions["forces"].dtype == np.float32
        assert (out / "configs" / f"{run}.yml").is_file()


def test_training_learned_something(undisturbed):
    measured = json.loads((undisturbed[0] / "results.json").read_text())
    found = numbers(undisturbed[0])
    for run in ("baseline", "dens"):
        assert measured[run]["train_seconds"] > 0
        assert found[run]["val"]["forces_cosine_similarity"] > 0.2
    assert found["denoising"]["mae"] < found["denoising"]["mae_of_no_guess"]


def test_killed_demo_ends_with_the_same_numbers(undisturbed, tmp_path):
    out = tmp_path / "demo"
    log = out / "logs" / "dens-train.log"
    for how, line in ((signal.SIGKILL, "step: 1"), (signal.SIGTERM, "step: 2")):
        process = start(out)
        wait_for(lambda: log.is_file() and line in log.read_text(), process)  # noqa: B023
        process.send_signal(how)
        process.wait(timeout=120)
    finish(start(out))
    assert log.read_text().count("$ fairchem") == 3
    assert numbers(out) == numbers(undisturbed[0])

    # Everything is done: the same command only collects.
    before = log.stat().st_mtime_ns
    assert "done before" in finish(start(out))
    assert log.stat().st_mtime_ns == before
    assert numbers(out) == numbers(undisturbed[0])
