"""Steps of a real trainer: what is skipped, what is printed, what waits for the device, which precision."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_dens.errors import TooManyBadSteps
from fairchem_dens.training import finite

Trainer = Callable[..., Any]


def sick_in(trainer: Any, *steps: int, by: float = float("nan")) -> None:
    """Make the model's vectors sick in some steps, for a free atom of the first structure."""

    def spoil(_module: Any, _inputs: Any, outputs: dict[str, torch.Tensor]) -> None:
        if trainer.model.training and trainer.step in steps:
            for name in ("forces", "noise"):
                outputs[name] = outputs[name].index_fill(0, torch.tensor([8]), by)

    trainer.model.register_forward_hook(spoil)


def logged(trainer: Any) -> list[tuple[int, str, dict[str, float]]]:
    """What the logger is given, in a list that fills as the run goes on."""
    seen: list[tuple[int, str, dict[str, float]]] = []
    trainer.logger._logger.log = lambda numbers, step, split: seen.append((step, split, dict(numbers)))
    return seen


def weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("fused", [False, True])
def test_a_sick_step_changes_no_weight_and_is_named(
    settings: dict[str, Any], make_trainer: Trainer, caplog: pytest.LogCaptureFixture, fused: bool
) -> None:
    """In both ways: the host skips, as on CPU; and torch's fused AdamW does, as on a GPU."""
    if fused:
        settings["optim"]["optimizer_params"]["fused"] = True
    trainer = make_trainer(settings, print_every=4)
    trainer.bad_steps._delay = int(fused)
    sick_in(trainer, 3, 4, 9)
    seen, after = logged(trainer), {}
    trainer.optimizer.register_step_post_hook(lambda *_: after.update({trainer.step: weights(trainer)}))
    with caplog.at_level(logging.WARNING):
        trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 12 and trainer.bad_steps.total == 3 and trainer.bad_steps.in_a_row == 0
    for step in range(2, 13):
        same = all(map(torch.equal, after[step - 1], after[step]))
        assert same == (step in (3, 4, 9)), step
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {9}, "a skipped step counts for the optimizer"
    said = [message for message in caplog.messages if "skipped: loss or gradient" in message]
    assert [message.split()[1] for message in said] == ["3", "4", "9"]
    assert "2 in a row, 2 in this run" in said[1] and "1 in a row, 3 in this run" in said[2]
    named = said[0].split("not finite: ")[1].split(";")[0]
    assert named.startswith("sid ") and named.count("sid") == 1
    assert said[0].split("all: ")[1].count("sid") == 4
    assert [step for step, split, _ in seen if split == "train"] == [4, 8, 12]
    for _, _, numbers in seen:
        assert all(value == value for value in numbers.values()), "a sick step is in an average"
    assert seen[-1][2]["skipped_steps"] == 3
    assert "3 steps of this run were skipped" in caplog.messages[-1]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_skips_and_is_told(
    settings: dict[str, Any], make_trainer: Trainer, caplog: pytest.LogCaptureFixture, fused: bool
) -> None:
    """fairchem's float16, with the scaler on the CPU: it skips by itself, or through a fused optimizer."""
    if fused:
        settings["optim"]["optimizer_params"]["fused"] = True
    trainer = make_trainer(settings, print_every=4)
    trainer.scaler = torch.GradScaler("cpu", init_scale=2.0**10)
    sick_in(trainer, 3, 8)
    seen = logged(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train(disable_eval_tqdm=True)
    assert trainer.bad_steps.total == 2 and trainer.scaler.get_scale() == 2.0**8
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {10}
    assert "Step 3 skipped" in caplog.text and "Step 8 skipped" in caplog.text
    plain = make_trainer(settings, print_every=4)
    expected = logged(plain)
    plain.train(disable_eval_tqdm=True)
    # The loss and the norm are those without the scale.
    for name in ("loss", "grad_norm"):
        assert seen[0][2][name] == pytest.approx(expected[0][2][name], rel=0.5), name
    assert trainer.save() is not None


def test_too_many_in_a_row_leave_a_checkpoint_of_the_last_good_state(
    settings: dict[str, Any], make_trainer: Trainer
) -> None:
    settings["optim"]["max_bad_steps_in_a_row"] = 4
    trainer = make_trainer(settings)
    sick_in(trainer, *range(5, 13))
    good = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: good.append(weights(trainer)) if trainer.step == 4 else None
    )
    with pytest.raises(TooManyBadSteps, match="4 steps in a row, up to step 8"):
        trainer.train(disable_eval_tqdm=True)
    file = trainer.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["step"] == 8
    saved = list(checkpoint["state_dict"].values())
    assert all(any(torch.equal(weight, value) for value in saved) for weight in good[0])
    assert all(torch.isfinite(value).all() for value in [*saved, *checkpoint["ema"]["shadow_params"]])
    resumed = make_trainer(settings, timestamp_id="resumed")
    resumed.load_checkpoint(file)
    assert resumed.bad_steps.total == 4
    resumed.train(disable_eval_tqdm=True)
    assert resumed.step == 12


def test_a_sick_label_is_noticed_though_its_gradient_is_zero(
    settings: dict[str, Any], make_trainer: Trainer
) -> None:
    trainer = make_trainer(settings)
    forward = trainer._forward

    def with_sick_label(batch: Any) -> Any:
        if trainer.model.training and trainer.step == 2:
            batch.energy[1] = float("nan")
        return forward(batch)

    trainer._forward = with_sick_label
    trainer.train(disable_eval_tqdm=True)
    assert trainer.bad_steps.total == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_bad_steps_in_a_row", 0, "whole number from 1, found 0"),
        ("max_bad_steps_in_a_row", "many", "found 'many'"),
        ("amp_dtype", "float8", "'float16' or 'bfloat16', found 'float8'"),
    ],
)
def test_impossible_settings(
    settings: dict[str, Any], make_trainer: Trainer, key: str, value: Any, said: str
) -> None:
    settings["optim"][key] = value
    with pytest.raises(ValueError, match=rf"'optim\.{key}'.*{said}"):
        make_trainer(settings)


# ------------------------------------------------------------------ numbers


def test_what_is_logged_has_units(settings: dict[str, Any], make_trainer: Trainer) -> None:
    settings["loss_functions"][2]["noise"] |= {"decay": "linear", "reduction": "separate"}
    trainer = make_trainer(settings, print_every=6)
    seen = logged(trainer)
    trainer.train(disable_eval_tqdm=True)
    (first, _, one), (second, _, two) = seen
    assert (first, second) == (6, 12)
    assert {
        "loss", "energy_mae", "forces_mae", "forces_cosine_similarity",
        "denoising_energy_mae", "denoising_force_mae", "denoising_pos_mae",
        "grad_norm", "lr", "epoch", "step", "skipped_steps",
        "noise_std_A", "noise_prob", "noise_coefficient", "corrupted_share",
        "throughput_structures_per_s", "throughput_atoms_per_s", "memory_host_peak_GiB",
    } == set(one) == set(two)  # fmt: skip
    assert one["noise_std_A"] == pytest.approx(0.1) and one["noise_prob"] == 0.5
    assert (one["noise_coefficient"], two["noise_coefficient"]) == (10, 5)
    assert 0 < one["corrupted_share"] < 1
    assert one["throughput_atoms_per_s"] == pytest.approx(12 * one["throughput_structures_per_s"], rel=0.1)
    assert one["grad_norm"] > 0 and 0.05 < one["memory_host_peak_GiB"] < 100


def test_averages_are_those_of_the_steps(settings: dict[str, Any], make_trainer: Trainer) -> None:
    """Printed each step and printed once: the mean over steps is the mean of all structures."""
    every, once = (make_trainer(settings, print_every=count, timestamp_id=str(count)) for count in (1, 6))
    single, whole = logged(every), logged(once)
    for trainer in (every, once):
        trainer.train(disable_eval_tqdm=True)
    losses = [numbers["loss"] for _, _, numbers in single]
    assert len(single) == 12 and len(whole) == 2
    assert whole[0][2]["loss"] == pytest.approx(sum(losses[:6]) / 6, rel=1e-9)
    assert min(losses) < whole[1][2]["loss"] < max(losses)


def test_validation_gives_numbers(settings: dict[str, Any], make_trainer: Trainer) -> None:
    trainer = make_trainer(settings)
    seen = logged(trainer)
    metrics = trainer.validate("val", disable_tqdm=True)
    assert set(metrics) == {"energy_mae", "forces_mae", "forces_cosine_similarity", "loss"}
    assert all(type(value["metric"]) is float for value in metrics.values())
    assert metrics["energy_mae"]["numel"] == 6
    assert seen[0][1] == "val" and seen[0][2]["energy_mae"] == metrics["energy_mae"]["metric"]


# ------------------------------------------------------------------ what waits


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, outside the model; `_to_copy` would leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.counting = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        index = name == "index" and any(
            isinstance(one, torch.Tensor) and one.dtype is torch.bool for one in args[1]
        )
        if self.counting and (index or any(name.startswith(waiting) for waiting in WAITING)):
            self.seen["index with a mask" if index else name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("printed", [False, True])
def test_a_step_waits_for_nothing(settings: dict[str, Any], make_trainer: Trainer, printed: bool) -> None:
    """With torch's fused AdamW, as on a GPU; in a step that is printed, once."""
    settings["optim"]["optimizer_params"]["fused"] = True
    settings["evaluation_metrics"]["metrics"]["misc"] = ["energy_forces_within_threshold"]
    trainer = make_trainer(settings, print_every=1 if printed else 1000)
    # What is done while the batch is still on the host, and by the model, is not counted.
    waits, per_step = Waits(), []
    trainer.model.register_forward_hook(lambda *_: setattr(waits, "counting", trainer.model.training))
    update_average = trainer.ema.update

    def end_of_step() -> None:
        update_average()
        if not printed:
            waits.counting = False
            per_step.append(Counter(waits.seen))
            waits.seen.clear()

    trainer.ema.update = end_of_step
    take = trainer._running.take

    def printing(sum_over_ranks: Any) -> Any:
        result = take(sum_over_ranks)
        waits.counting = False
        per_step.append(Counter(waits.seen))
        waits.seen.clear()
        return result

    trainer._running.take = printing
    with waits:
        trainer.train(disable_eval_tqdm=True)
    assert len(per_step) >= 12
    # fairchem makes a shape of the number of atoms, which `HostSizes` has on the host; there is nothing else.
    # (`tolist`, once for all numbers that are printed, is no operation of torch's.)
    assert all(seen == {"_local_scalar_dense": 1} for seen in per_step), per_step


def test_the_counter_counts(settings: dict[str, Any], make_trainer: Trainer) -> None:
    """fairchem's own loss and metrics, by the same measure."""
    from fairchem.core.trainers import OCPTrainer

    trainer, waits = make_trainer(settings), Waits()
    trainer.model.eval()
    (batch, *_) = trainer.val_loader
    out = trainer._forward(batch)
    with waits:
        waits.counting = True
        trainer._compute_loss(out, batch)
        trainer._measure(out, batch, trainer.evaluator)
        assert not waits.seen
        OCPTrainer._compute_loss(trainer, out, batch)
        OCPTrainer._compute_metrics(trainer, out, batch, trainer.evaluator, {})
    assert waits.seen["_local_scalar_dense"] >= 10 and waits.seen["index with a mask"] >= 2


# ------------------------------------------------------------------ precision


def test_bfloat16_on_the_cpu(settings: dict[str, Any], make_trainer: Trainer) -> None:
    settings["optim"]["amp_dtype"] = "bf16"
    trainer, plain = make_trainer(settings, amp=True), make_trainer(settings)
    assert trainer.scaler is None
    (batch, *_) = trainer.val_loader
    kinds = set()
    module = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear))
    module.register_forward_hook(lambda _module, _inputs, output: kinds.add(output.dtype))
    trainer.model.eval(), plain.model.eval()
    out, exact = trainer._forward(batch), plain._forward(batch)
    assert kinds == {torch.bfloat16}
    for name, value in out.items():
        assert value.dtype is torch.float32 and not torch.equal(value, exact[name])
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.05)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 12 and trainer.bad_steps.total == 0
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EquiformerV2DeNS"])
def test_a_real_model_in_bfloat16(
    settings: dict[str, Any], model_settings: dict[str, Any], make_trainer: Trainer, name: str
) -> None:
    settings["model"] = {"name": f"fairchem_dens.models.{name}", **model_settings}
    settings["optim"] |= {"amp_dtype": "bfloat16", "max_epochs": 1}
    trainer = make_trainer(settings, amp=True, print_every=6)
    seen = logged(trainer)
    trainer.train(disable_eval_tqdm=True)
    exact = make_trainer(settings, print_every=6)
    expected = logged(exact)
    exact.train(disable_eval_tqdm=True)
    assert trainer.bad_steps.total == 0
    assert seen[0][2]["loss"] == pytest.approx(expected[0][2]["loss"], rel=0.05)
    assert seen[0][2]["loss"] != expected[0][2]["loss"]


def test_float16_on_the_cpu_says_that_it_is_not(
    settings: dict[str, Any], make_trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(settings, amp=True)
    assert trainer.scaler is None and "optim.amp_dtype: bfloat16" in caplog.text


def test_a_checkpoint_of_a_fused_optimizer_goes_on_with_another(
    settings: dict[str, Any], make_trainer: Trainer
) -> None:
    """As from a GPU to the CPU and back: the same state, with the kernels of the place."""
    settings["optim"]["optimizer_params"]["fused"] = True
    settings["optim"]["checkpoint_every"] = 6
    fused = make_trainer(settings, timestamp_id="fused")
    fused.train(disable_eval_tqdm=True)
    file = fused.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt"
    del settings["optim"]["optimizer_params"]["fused"]
    settings["optim"]["max_epochs"] = 3
    plain = make_trainer(settings, timestamp_id="plain")
    plain.load_checkpoint(file)
    assert not any(group["fused"] for group in plain.optimizer.param_groups)
    assert not finite.can_skip_on_device(plain.optimizer)
    states = zip(fused.optimizer.state.values(), plain.optimizer.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg"], other["exp_avg"]) for one, other in states)
    plain.train(disable_eval_tqdm=True)
    assert plain.step == 18
