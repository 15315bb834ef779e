"""The moving average against fairchem's: the same bits on CPU, the same state."""

from __future__ import annotations

import pytest
import torch
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from torch import nn

from fairchem_dens.training.moving_average import ForeachAverage


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_equals_fairchems(decay: float, counted: bool) -> None:
    model = nn.Sequential(nn.Linear(17, 33), nn.Linear(33, 5))
    model[0].bias.requires_grad_(False)
    theirs = ExponentialMovingAverage(model.parameters(), decay, use_num_updates=counted)
    ours = ForeachAverage(model.parameters(), decay, use_num_updates=counted)
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        if step == 6:  # each goes on from the other's state
            state = theirs.state_dict()
            theirs.load_state_dict(ours.state_dict())
            ours.load_state_dict(state)
        theirs.update()
        ours.update()
        assert ours.num_updates == theirs.num_updates
        # A step of more than one half torch makes from the other end, which rounds otherwise.
        for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_a_step_of_training_is_bit_for_bit_fairchems() -> None:
    model = nn.Linear(40, 40)
    theirs, ours = (kind(model.parameters(), 0.999) for kind in (ExponentialMovingAverage, ForeachAverage))
    for _ in range(20):
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn_like(model.weight))
        theirs.update()
        ours.update()
    assert all(
        torch.equal(one, other) for one, other in zip(ours.shadow_params, theirs.shadow_params, strict=True)
    )
    assert not torch.equal(ours.shadow_params[0], model.weight)
