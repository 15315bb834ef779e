"""Runs that are stopped in the middle of an epoch and go on: bit for bit the undisturbed ones."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import checks
from .campaign import CHECKPOINT_EVERY, PATIENCE, Campaign, Variant
from .commands import Forked

MATRIX = [Variant(*axes) for axes in itertools.product((0, 2), ("structure", "batch"), (True, False))]


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    with Forked() as forked:
        yield forked


@pytest.mark.slow
@pytest.mark.parametrize("variant", MATRIX, ids=lambda variant: variant.name)
def test_stopped_twice_and_resumed_is_undisturbed(
    forked: Forked, tmp_path: Path, run_settings: dict[str, Any], variant: Variant
) -> None:
    """Killed in step 10, of which the checkpoint of step 8 is left; then stopped by SIGTERM in step 11."""
    campaign = Campaign(tmp_path, run_settings, seed=0, variants=(variant,))
    checkpoint = tmp_path / "checkpoints" / "run" / "checkpoint.pt"
    assert campaign.to_the_end(forked, variant, f"whole_{variant.name}"), campaign.tally.problems()

    strike = {"phase": "step", "occurrence": 10, "call": 1000}
    run = campaign.start(forked, variant, "run", watch={"strike": strike})
    assert forked.wait(run, PATIENCE) == -signal.SIGKILL, run.said()[-4000:]
    assert run.phase.step == 10
    left = checks.read(checkpoint)
    assert left["step"] == 2 * CHECKPOINT_EVERY and left["epoch"] % 1 != 0, "not in the middle of an epoch"
    assert (left["ema"] is not None) == variant.ema

    run = campaign.start(forked, variant, "run", watch={})
    for watched in forked.follow(run, PATIENCE):
        if watched.phase.name == "step" and watched.phase.step == 11:
            run.send(signal.SIGTERM)
            break
    assert forked.wait(run, PATIENCE) == 128 + signal.SIGTERM, run.said()[-4000:]
    assert run.first_step == 9
    assert checks.read(checkpoint)["step"] in (10, 11, 12)

    assert campaign.to_the_end(forked, variant, "run", checks.readable(checkpoint.parent, {})[0])
    assert campaign.compare(variant, "run"), campaign.tally.mismatches
    assert not campaign.tally.problems()


def test_an_error_while_the_best_checkpoint_predicts(
    make_trainer: Callable[..., Any],
    run_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file of the last step then says that this was the best; what is missing of it is made up for."""
    run_settings["optim"] |= {"max_epochs": 1, "batch_size": 8, "eval_every": 3, "checkpoint_every": 2}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no worker")

    trainer = make_trainer(run_settings)
    monkeypatch.setattr(trainer, "predict", fail)
    with pytest.raises(RuntimeError, match="no worker"):
        trainer.train(disable_eval_tqdm=True)
    predictions = tmp_path / "results" / "test" / "s2ef_predictions.npz"
    assert not predictions.exists()
    again = make_trainer(run_settings)
    again.load_checkpoint(str(tmp_path / "checkpoints" / "test" / "checkpoint.pt"))
    assert again.step == 3
    again.train(disable_eval_tqdm=True)
    assert predictions.exists() and again.best_val_metric == trainer.best_val_metric
