"""Means over steps: what is added, what is left out, and that nothing of it waits."""

from __future__ import annotations

import pytest
import torch

from fairchem_dens.objective import Mean
from fairchem_dens.training.running import RunningEvaluator, RunningMeans, on_host, unread

HERE = torch.device("cpu")


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def test_means_over_steps() -> None:
    means = RunningMeans(HERE)
    for total, numel in ((3.0, 2), (5.0, 2), (0.0, 0)):
        means.add("error", torch.tensor(total), torch.tensor(numel))
        means.add("loss", total)
        means.end_step()
    assert means.take(alone) == {
        "error": {"metric": 2.0, "total": 8.0, "numel": 4.0},
        "loss": {"metric": pytest.approx(8 / 3), "total": 8.0, "numel": 3.0},
    }
    assert means.take(alone) == {}


def test_what_has_no_element_is_left_out() -> None:
    means = RunningMeans(HERE)
    means.add("nothing", torch.tensor(0.0), torch.tensor(0))
    means.add("loss", 1.0)
    means.end_step()
    assert set(means.take(alone)) == {"loss"}


def test_a_sick_step_does_not_hide_the_others() -> None:
    means = RunningMeans(HERE)
    for value in (1.0, float("nan"), float("inf"), 3.0):
        means.add("loss", torch.tensor(value))
        means.end_step()
    assert means.take(alone)["loss"] == {"metric": 2.0, "total": 4.0, "numel": 2.0}


def test_the_sum_over_ranks_is_one_tensor_of_the_same_shape_with_and_without_elements() -> None:
    shapes = []

    def look(values: torch.Tensor) -> torch.Tensor:
        shapes.append(values.shape)
        return 2 * values

    for numel in (0, 3):
        means = RunningMeans(HERE)
        means.add("a", torch.tensor(1.0 * numel), torch.tensor(numel))
        means.add("b", 1.0)
        means.end_step()
        taken = means.take(look)
        assert taken["b"]["numel"] == 2
    assert shapes == [(2, 2), (2, 2)] and taken["a"] == {"metric": 1.0, "total": 6.0, "numel": 6.0}


def test_other_names_in_a_later_step_are_refused() -> None:
    means = RunningMeans(HERE)
    means.add("a", 1.0)
    means.end_step()
    means.add("b", 1.0)
    with pytest.raises(ValueError, match=r"'b'.*'a'"):
        means.end_step()


def test_fairchems_calls_leave_the_loss_where_it_is() -> None:
    loss = unread((torch.ones(3, requires_grad=True) * 2).sum())
    value = loss.item()
    assert isinstance(value, torch.Tensor) and value.grad_fn is None and float(value) == 6
    loss.backward()  # it is still the loss
    means = RunningMeans(HERE)
    evaluator = RunningEvaluator(task="s2ef")
    assert evaluator.update("loss", value, means) is means
    means.end_step()
    assert means.take(alone)["loss"]["metric"] == 6
    assert evaluator.update("loss", 2.0, {})["loss"]["metric"] == 2.0


def test_to_the_host_in_one_transfer() -> None:
    assert on_host({"a": Mean(torch.tensor(2.0), torch.tensor(3)), "b": Mean(1.0, 2)}) == {
        "a": (2.0, 3.0),
        "b": (1.0, 2.0),
    }
    assert on_host({}) == {}
