"""What the trainer does around a step: decay groups, averaged weights, schedules, names, loggers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens.resumable import ResumableTrainer


def decayed(trainer: Any) -> dict[str, bool]:
    """For each trained parameter, whether the optimizer decays it."""
    names = {id(parameter): name for name, parameter in trainer._unwrapped_model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"] > 0
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


def test_biases_and_norms_are_not_decayed_and_embeddings_are(run_settings, make_trainer) -> None:
    trainer = make_trainer(run_settings)
    groups = decayed(trainer)
    assert set(groups) == {name for name, _ in trainer._unwrapped_model.named_parameters()}
    for name in ("sphere_embedding.weight", "force_embedding.weight", "blocks.0.ga.alpha_dot"):
        assert groups[name]
    for name, is_decayed in groups.items():
        assert is_decayed == (not name.endswith("bias") and "norm" not in name and ".net.1." not in name
                              and ".net.4." not in name), name  # fmt: skip  # net.1 and net.4 are layer norms


def test_a_hydra_model_is_decayed_by_the_same_rule(run_settings, make_trainer, model_settings) -> None:
    """fairchem decays the norms of a backbone and spares its embeddings."""
    run_settings["loss_functions"] = run_settings["loss_functions"][:2]
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["model"] = {
        "name": "hydra",
        "pass_through_head_outputs": True,
        "otf_graph": True,
        "backbone": {"model": "equiformer_v2_backbone", **model_settings},
        "heads": {
            "energy": {"module": "equiformer_v2_energy_head"},
            "forces": {"module": "equiformer_v2_force_head"},
        },
    }
    groups = decayed(make_trainer(run_settings))
    assert groups["backbone.sphere_embedding.weight"]
    assert not groups["backbone.norm.affine_weight"]
    assert not groups["backbone.blocks.0.norm_1.norm_l0.weight"]


def test_prediction_of_one_batch_gives_the_weights_back(run_settings, make_trainer, structure) -> None:
    """fairchem returns before it swaps them back; relaxations and calculators predict this way."""
    trainer = make_trainer(run_settings)
    trainer.train(disable_eval_tqdm=True)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    averaged = trainer.ema.shadow_params
    assert any(not torch.equal(ours, mean) for ours, mean in zip(before, averaged, strict=True))
    batch = Batch.from_data_list([structure(0), structure(1)])
    with_average = trainer.predict(batch, per_image=False, disable_tqdm=True)["energy"]
    after = list(trainer.model.parameters())
    assert all(torch.equal(ours, now) for ours, now in zip(before, after, strict=True))
    trainer.ema = None
    without = trainer.predict(batch, per_image=False, disable_tqdm=True)["energy"]
    assert not torch.equal(with_average, without)


def test_the_schedule_stands_where_the_step_does(run_settings, make_trainer, tmp_path) -> None:
    """fairchem writes the file of step k with the schedule at k - 1, and goes on from there."""
    run_settings["optim"] |= {"checkpoint_every": 5, "max_epochs": 1}
    whole = make_trainer(run_settings, timestamp_id="whole")
    rates = []
    step = whole.scheduler.step
    whole.scheduler.step = lambda *_args, **_kwargs: (rates.append(whole.scheduler.get_lr()), step())
    whole.train(disable_eval_tqdm=True)
    resumed = make_trainer(run_settings, timestamp_id="resumed")
    file = torch.load(whole.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt", weights_only=True)
    assert file["step"] == 6
    file["step"], file["scheduler"]["last_epoch"] = 5, 4
    path = tmp_path / "five.pt"
    torch.save(file, path)
    resumed.load_checkpoint(str(path))
    assert resumed.scheduler.scheduler.last_epoch == 5
    assert resumed.scheduler.get_lr() == pytest.approx(rates[5], rel=1e-12)


def test_two_runs_started_in_the_same_minute_have_different_names(monkeypatch) -> None:
    """fairchem rounds the time to single precision; the second run would resume the first."""
    import datetime

    class Clock(datetime.datetime):
        seconds = 1_790_000_000

        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(cls.seconds, tz)

    monkeypatch.setattr("fairchem_dens.resumable.datetime.datetime", Clock)
    names = []
    for _ in range(3):
        names.append(ResumableTrainer._get_timestamp(torch.device("cpu"), "run"))
        Clock.seconds += 7
    assert len(set(names)) == 3


def test_no_logger(run_settings, make_trainer) -> None:
    run_settings["logger"] = "none"
    trainer = make_trainer(run_settings)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 12


def test_load_balancing_without_metadata_goes_on(
    run_settings, make_trainer, write_lmdb, structure, tmp_path, caplog
) -> None:
    folder = write_lmdb(tmp_path / "bare", [structure(seed) for seed in range(8)], with_metadata=False)
    run_settings["dataset"]["train"]["src"] = str(folder)
    run_settings["optim"]["load_balancing"] = "atoms"
    make_trainer(run_settings).train(disable_eval_tqdm=True)
    assert "falling back to uniform partitioning" in caplog.text


def test_paths_know_variables(run_settings, make_trainer, lmdb_folders, monkeypatch) -> None:
    monkeypatch.setenv("DATA_OF_THIS_TEST", str(lmdb_folders["train"].parent))
    for split in ("train", "val", "test"):
        run_settings["dataset"][split]["src"] = f"$DATA_OF_THIS_TEST/{split}"
    assert len(make_trainer(run_settings).train_dataset) == 24


def test_inference_only_without_data(run_settings, make_trainer) -> None:
    """As OCPCalculator builds it: a list of one data set without src."""
    train = {key: value for key, value in run_settings["dataset"]["train"].items() if key != "src"}
    run_settings["dataset"] = [train]
    trainer = make_trainer(run_settings, inference_only=True, is_debug=True)
    assert trainer.name == "s2ef" and trainer.config["trainer"] == "fairchem_dens.trainer.DeNSTrainer"


def test_no_seed_means_zero(run_settings, make_trainer) -> None:
    one, other = make_trainer(run_settings, seed=None), make_trainer(run_settings, seed=0)
    assert one.seed == 0
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_sum_over_forces_is_refused(run_settings, make_trainer) -> None:
    run_settings["loss_functions"][1]["forces"]["reduction"] = "sum"
    with pytest.raises(ValueError, match=r"loss_functions\.forces\.reduction.*sum.*must be mean"):
        make_trainer(run_settings)
