"""What a GPU changes around the model: nothing waits in a step, the fused optimizer skips, precisions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fairchem_dens.training import finite
from fairchem_dens.training.moving_average import ForeachAverage

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def settings(run_settings: dict[str, Any]) -> dict[str, Any]:
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    run_settings["logger"] = "none"
    run_settings["evaluation_metrics"]["metrics"]["misc"] = ["energy_forces_within_threshold"]
    return run_settings


def sick_in(trainer: Any, *steps: int) -> None:
    def spoil(_module: Any, _inputs: Any, outputs: dict[str, torch.Tensor]) -> None:
        if trainer.model.training and trainer.step in steps:
            for name in ("forces", "noise"):
                free_atom = torch.arange(len(outputs[name]), device=outputs[name].device) == 8
                outputs[name] = torch.where(free_atom[:, None], torch.nan, outputs[name])

    trainer.model.register_forward_hook(spoil)


@pytest.mark.parametrize("amp", [None, "float16", "bfloat16"])
def test_no_step_waits(settings: dict[str, Any], make_trainer: Callable[..., Any], amp: str | None) -> None:
    """torch warns of each wait; from the transfer of a batch to the update of the average there is none."""
    if amp is not None:
        settings["optim"]["amp_dtype"] = amp
    trainer = make_trainer(settings, cpu=False, amp=amp is not None, print_every=1000)
    assert finite.can_skip_on_device(trainer.optimizer) and isinstance(trainer.ema, ForeachAverage)
    forward, end_step = trainer._forward, trainer._end_step

    def begin(batch: Any) -> Any:
        assert batch.pos.is_pinned()
        # The first step makes the optimizer's state.
        torch.cuda.set_sync_debug_mode("warn" if trainer.step > 1 and trainer.model.training else "default")
        return forward(batch)

    def end() -> None:
        end_step()
        torch.cuda.set_sync_debug_mode("default")

    trainer._forward, trainer._end_step = begin, end
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train(disable_eval_tqdm=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in said if "synchroniz" in str(one.message)]
    assert not waits, waits
    assert trainer.step == 12


@pytest.mark.parametrize("amp", [None, "float16", "bfloat16"])
def test_a_sick_step_is_skipped_on_the_device(
    settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    amp: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if amp is not None:
        settings["optim"]["amp_dtype"] = amp
    trainer = make_trainer(settings, cpu=False, amp=amp is not None, print_every=4)
    assert (trainer.scaler is not None) == (amp == "float16")
    sick_in(trainer, 3, 8)
    with caplog.at_level(logging.WARNING):
        trainer.train(disable_eval_tqdm=True)
    assert trainer.bad_steps.total >= 2
    for step in (3, 8):
        assert f"Step {step} skipped" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    updates = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert updates == {12 - trainer.bad_steps.total}


def test_a_run_resumes_on_the_other_device(
    settings: dict[str, Any], make_trainer: Callable[..., Any]
) -> None:
    there = make_trainer(settings, cpu=False, timestamp_id="there")
    there.train(disable_eval_tqdm=True)
    settings["optim"]["max_epochs"] = 3
    file = there.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt"
    here = make_trainer(settings, cpu=True, timestamp_id="here")
    here.load_checkpoint(file)
    assert not finite.can_skip_on_device(here.optimizer)
    here.train(disable_eval_tqdm=True)
    back = make_trainer(settings, cpu=False, timestamp_id="back")
    settings["optim"]["max_epochs"] = 4
    back = make_trainer(settings, cpu=False, timestamp_id="back")
    back.load_checkpoint(here.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt")
    assert finite.can_skip_on_device(back.optimizer)
    assert all(state["step"].is_cuda for state in back.optimizer.state.values())
    back.train(disable_eval_tqdm=True)
    assert back.step == 24
