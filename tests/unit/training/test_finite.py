"""What is done about a step that is not finite, piece by piece; the trainer's tests have it together."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from fairchem_dens.errors import TooManyBadSteps
from fairchem_dens.training import finite
from fairchem_dens.training.in_flight import InFlight

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_sick_loss_poisons_gradients_that_would_not_show_it(value: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight.sum() - torch.tensor(value)).abs().reshape(())
    loss.backward(retain_graph=True)
    assert weight.grad is not None and torch.isfinite(weight.grad).all(), "torch shows it by itself"
    weight.grad = None
    finite.poisoned(loss).backward()
    assert not torch.isfinite(weight.grad).any()


def test_a_healthy_loss_is_not_touched() -> None:
    weight = torch.randn(50, requires_grad=True)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    expected, weight.grad = weight.grad, None
    poisoned = finite.poisoned(loss)
    poisoned.backward()
    assert torch.equal(poisoned, loss) and torch.equal(weight.grad, expected)


def test_clipping_is_torchs() -> None:
    weight = nn.Parameter(torch.randn(20))
    weight.grad = torch.randn(20)
    expected = nn.Parameter(weight.detach().clone())
    expected.grad = weight.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([expected], 0.5)
    assert torch.equal(finite.clip([weight], 0.5), norm) and torch.equal(weight.grad, expected.grad)
    before = weight.grad.clone()
    finite.clip([weight], None)
    assert torch.equal(weight.grad, before)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
    "SGD fused": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.5, fused=True
    ),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_is_as_if_it_had_not_been(name: str) -> None:
    """Weights, moments, decay and counts; with torch's fused optimizers without a look at the host."""
    gradients = [torch.randn(10) for _ in range(4)]
    weights = []
    for with_bad_steps in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 10))
        optimizer = OPTIMIZERS[name]([weight])
        assert finite.can_skip_on_device(optimizer) == (name == "AdamW fused")
        for gradient in gradients:
            for bad in (True, False) if with_bad_steps else (False,):
                weight.grad = torch.full_like(gradient, NAN) if bad else gradient.clone()
                finite.skip_if(torch.tensor(bad), optimizer)
                optimizer.step()
                finite.forget_skip(optimizer)
                assert not hasattr(optimizer, "found_inf")
        weights.append(weight.detach())
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert all(float(step) == len(gradients) for step in steps)
    assert torch.equal(*weights) and torch.isfinite(weights[0]).all()


def in_flight(*natoms: int) -> InFlight:
    return InFlight.of(
        Batch.from_data_list(
            [
                Data(pos=torch.zeros(count, 3), natoms=count, sid=10 + index, fid=index)
                for index, count in enumerate(natoms)
            ]
        )
    )


def end(bad_steps: finite.BadSteps, step: int, bad: bool, **outputs: torch.Tensor) -> None:
    bad_steps.ended(
        step,
        bad=torch.tensor(bad),
        loss=torch.tensor(NAN if bad else 1.0),
        in_flight=in_flight(2, 3),
        outputs=outputs,
    )


def test_the_structures_are_named(caplog: pytest.LogCaptureFixture) -> None:
    bad_steps = finite.BadSteps(limit=5, delay=0)
    forces = torch.zeros(5, 3)
    forces[3, 1] = NAN
    end(bad_steps, 1, False)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        end(bad_steps, 2, True, forces=forces, energy=torch.tensor([[INF], [0.0]]))
        end(bad_steps, 3, True, forces=forces, energy=torch.zeros(2, 1))
    first, second = caplog.messages
    assert "Step 2 skipped" in first and "all: sid 10 fid 0, sid 11 fid 1" in first and "loss nan" in first
    assert "predictions not finite: sid 10 fid 0, sid 11 fid 1;" in first
    assert "predictions not finite: sid 11 fid 1;" in second and "2 in a row, 2 in this run" in second
    assert (bad_steps.total, bad_steps.in_a_row) == (2, 2)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_too_many_in_a_row(delay: int) -> None:
    bad_steps = finite.BadSteps(limit=3, delay=delay)
    for step, bad in enumerate([True, True, False, True, True, False]):
        end(bad_steps, step, bad)
    bad_steps.finish()
    assert (bad_steps.total, bad_steps.in_a_row) == (4, 0)
    for step in range(10, 12 + delay):
        end(bad_steps, step, True)
    with pytest.raises(TooManyBadSteps, match=r"3 steps in a row, up to step 12.*max_bad_steps_in_a_row"):
        end(bad_steps, 12 + delay, True)


def test_what_the_host_looks_at_later_is_what_it_was() -> None:
    values = torch.tensor([1.0, NAN])
    late = finite.Late(values.clone())
    assert late.read()[0] == 1.0 and late.read()[1] != late.read()[1]
