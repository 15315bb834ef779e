"""The three ways to start from a checkpoint: resume, fine-tune, inference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens import checkpoints
from fairchem_dens.checkpoints.convert import export_checkpoint, import_checkpoint, strip_checkpoint
from fairchem_dens.checkpoints.fine_tuning import FineTuning

Settings = dict[str, Any]


@pytest.fixture
def start(run_settings: Settings, make_trainer: Callable[..., Any]) -> Path:
    """A checkpoint of another run than the tests', with other normalisers."""
    settings = copy.deepcopy(run_settings)
    settings["dataset"]["train"]["transforms"]["normalizer"] = {
        "energy": {"mean": -3.0, "rmsd": 2.5},
        "forces": {"mean": 0.0, "rmsd": 1.7},
    }
    settings["optim"] |= {"lr_initial": 0.02, "max_epochs": 1}
    trainer = make_trainer(settings, timestamp_id="start", seed=5)
    trainer.train(disable_eval_tqdm=True)
    return Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt"


def fine_tuned(settings: Settings, file: Path | str, normalizers: str | None = "checkpoint") -> Settings:
    key = {"starting_checkpoint": str(file)} | ({} if normalizers is None else {"normalizers": normalizers})
    return settings | {"model": settings["model"] | {"finetune_config": key}}


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer._unwrapped_model.named_parameters()}


class TestFineTuning:
    @pytest.mark.parametrize(("normalizers", "mean", "rmsd"), [("checkpoint", -3.0, 2.5), ("data", 0.1, 1.2)])
    def test_weights_alone_are_taken(
        self, run_settings, make_trainer, start, caplog, normalizers, mean, rmsd
    ):
        trainer = make_trainer(fine_tuned(run_settings, start, normalizers))
        with caplog.at_level(logging.INFO):
            trainer._start()
        expected = checkpoints.predicting_weights(checkpoints.read(start))
        for name, value in weights_of(trainer).items():
            assert torch.equal(value, expected[name])
        for parameter, average in zip(trainer.model.parameters(), trainer.ema.shadow_params, strict=True):
            assert torch.equal(parameter, average), "the moving average begins at the weights"
        assert (trainer.step, trainer.epoch) == (0, 0) and not trainer.optimizer.state
        assert trainer.scheduler.scheduler.last_epoch == 0
        assert trainer.normalizers["energy"].mean.item() == pytest.approx(mean)
        assert trainer.normalizers["energy"].rmsd.item() == pytest.approx(rmsd)
        assert "step 0, and optimizer, schedule and moving average are fresh" in caplog.text
        assert f"normaliser of energy from the {normalizers}: mean {mean:g}, rmsd {rmsd:g}" in caplog.text

    def test_the_weights_are_the_moving_average_and_not_the_last(self, run_settings, make_trainer, start):
        trainer = make_trainer(fine_tuned(run_settings, start))
        trainer._start()
        last = checkpoints.weights_of(checkpoints.read(start))
        assert any(not torch.equal(value, last[name]) for name, value in weights_of(trainer).items())

    def test_the_run_begins_at_step_0_and_its_file_stands_alone(self, run_settings, make_trainer, start):
        trainer = make_trainer(fine_tuned(run_settings, start))
        trainer.train(disable_eval_tqdm=True)
        start.unlink()
        file = Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt"
        written = torch.load(file, weights_only=True)
        assert written["step"] == 12 and written["normalizers"]["energy"]["rmsd"] == 2.5
        assert "finetune_config" not in written["config"]["model"]
        origin = {"starting_checkpoint": str(start), "normalizers": "checkpoint"}
        assert written["config"]["fairchem_dens"]["fine_tuned_from"] == origin
        inference = make_trainer(written["config"] | {"dataset": {}}, inference_only=True)
        inference.load_checkpoint(str(file), inference_only=True)
        assert inference.normalizers["energy"].rmsd == 2.5

    def test_resuming_a_fine_tuned_run_does_not_begin_again(self, run_settings, make_trainer, start):
        """Not even where the file that it started from is gone; bit for bit."""
        settings = fine_tuned(run_settings, start)
        whole = make_trainer(copy.deepcopy(settings), timestamp_id="whole")
        whole.train(disable_eval_tqdm=True)
        half = make_trainer(copy.deepcopy(settings), timestamp_id="half")

        class Stop(Exception):  # noqa: N818
            pass

        def save_and_stop(*_: Any, **__: Any) -> None:
            if half.step == 7:
                half.save(checkpoint_file="checkpoint.pt", training_state=True)
                raise Stop

        backward = half._backward
        half._backward = lambda loss: (backward(loss), save_and_stop())
        with pytest.raises(Stop):
            half.train(disable_eval_tqdm=True)
        start.unlink()
        resumed = make_trainer(copy.deepcopy(settings), timestamp_id="resumed")
        resumed.load_checkpoint(f"{half.config['cmd']['checkpoint_dir']}/checkpoint.pt")
        assert resumed.step == 7 and resumed.normalizers["energy"].rmsd == 2.5
        resumed.train(disable_eval_tqdm=True)
        expected = weights_of(whole)
        for name, value in weights_of(resumed).items():
            assert torch.equal(value, expected[name]), name
        for ours, theirs in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
            assert torch.equal(ours, theirs)

    def test_element_references_go_with_the_normalisers(self, run_settings, make_trainer, start, tmp_path):
        checkpoint = checkpoints.read(start)
        references = torch.zeros(100)
        references[[1, 8, 29, 46]] = torch.tensor([-3.4, -7.2, -1.9, -2.6])
        checkpoint["elementrefs"] = {"energy": {"element_references": references}}
        checkpoints.write(checkpoint, tmp_path / "refs.pt")
        kept = make_trainer(fine_tuned(run_settings, tmp_path / "refs.pt"))
        kept._start()
        assert kept.elementrefs["energy"].element_references[8] == pytest.approx(-7.2)
        assert "refs.pt" in kept._reference_guards["energy"].origin
        fresh = make_trainer(fine_tuned(run_settings, tmp_path / "refs.pt", "data"))
        fresh._start()
        assert not fresh.elementrefs and not fresh._reference_guards

    def test_elements_without_a_reference_are_refused_before_the_first_step(
        self, run_settings, make_trainer, start, tmp_path
    ):
        checkpoint = checkpoints.read(start)
        references = torch.zeros(100)
        references[[1, 8, 29]] = -1.0
        checkpoint["elementrefs"] = {"energy": {"element_references": references}}
        checkpoints.write(checkpoint, tmp_path / "refs.pt")
        trainer = make_trainer(fine_tuned(run_settings, tmp_path / "refs.pt"))
        with pytest.raises(ValueError, match=r"contains Pd, and the checkpoint '.*refs\.pt' has no"):
            trainer.train(disable_eval_tqdm=True)

    def test_from_the_authors_after_import(self, run_settings, make_trainer, start, tmp_path):
        """Weights, in the authors' layout, of the same network: imported, and gone on with."""
        checkpoint = checkpoints.read(start)
        weights = checkpoints.weights_of(checkpoint)
        authors = {
            "state_dict": {f"module.module.{name}": value for name, value in weights.items()},
            "normalizers": {"target": {"mean": torch.tensor(-3.0), "std": torch.tensor(2.5)}},
            "config": {"model": "equiformer_v2_dens", "model_attributes": run_settings["model"] | {}},
        }
        authors["config"]["model_attributes"].pop("name")
        imported, _ = import_checkpoint(authors)
        checkpoints.write(imported, tmp_path / "imported.pt")
        trainer = make_trainer(fine_tuned(run_settings, tmp_path / "imported.pt"))
        trainer._start()
        for name, value in weights_of(trainer).items():
            assert torch.equal(value, weights[name])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"normalizers": None},
                r"'model\.finetune_config\.normalizers' must be 'checkpoint' \(keep.*'data'",
            ),
            ({"normalizers": "old"}, "found 'old'"),
            ({"starting_checkpoint": ""}, r"'model\.finetune_config\.starting_checkpoint' must name"),
            ({"override": {}}, r"Unknown setting 'model\.finetune_config\.override'"),
            ({"starting_checkpoint": "$NOWHERE/x.pt"}, "environment variable NOWHERE is not set"),
        ],
    )
    def test_what_is_unsaid_or_wrong_is_refused_at_once(self, run_settings, make_trainer, changes, said):
        key = {"starting_checkpoint": "x.pt", "normalizers": "data"} | changes
        run_settings["model"]["finetune_config"] = key
        with pytest.raises(ValueError, match=said):
            make_trainer(run_settings)

    def test_variables_in_the_path(self, monkeypatch):
        monkeypatch.setenv("WEIGHTS", "/somewhere")
        found = FineTuning.from_config({"starting_checkpoint": "$WEIGHTS/x.pt", "normalizers": "data"})
        assert found == FineTuning("/somewhere/x.pt", "data")

    def test_no_file(self, run_settings, make_trainer, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*absent\.pt'"):
            make_trainer(fine_tuned(run_settings, tmp_path / "absent.pt")).train()

    def test_normalisers_that_are_not_there(self, run_settings, make_trainer, start, tmp_path):
        checkpoints.write(checkpoints.read(start) | {"normalizers": {}}, tmp_path / "none.pt")
        with pytest.raises(ValueError, match=r"is 'checkpoint', but '.*none\.pt' holds none"):
            make_trainer(fine_tuned(run_settings, tmp_path / "none.pt")).train()
        del run_settings["dataset"]["train"]["transforms"]["normalizer"]
        with pytest.raises(
            ValueError, match=r"is 'data', but 'dataset\.train\.transforms\.normalizer' has none"
        ):
            make_trainer(fine_tuned(run_settings, start, "data")).train()

    @pytest.mark.parametrize(
        ("setting", "value", "said"),
        [
            ("lmax_list", [1], r"for 'lmax_list: \[2\]' and the model has 'lmax_list: \[1\]'"),
            ("sphere_channels", 4, "'sphere_channels' is 8 in the file and 4 in the model"),
            ("num_layers", 2, r"Missing in the file: blocks\.1"),
        ],
    )
    def test_another_model(self, run_settings, make_trainer, start, setting, value, said):
        run_settings["model"] |= {setting: value, "mmax_list": [1]}
        with pytest.raises(ValueError, match=said):
            make_trainer(fine_tuned(run_settings, start)).train()

    @pytest.mark.parametrize(
        ("convert", "said"),
        [(export_checkpoint, "hydra layout"), (strip_checkpoint, "plain model.*--new-dens")],
    )
    def test_another_layout(self, run_settings, make_trainer, start, tmp_path, convert, said):
        checkpoints.write(convert(checkpoints.read(start)).checkpoint, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=said):
            make_trainer(fine_tuned(run_settings, tmp_path / "other.pt")).train()

    def test_hydra_models_are_left_to_fairchem(self, run_settings, make_trainer, start, tmp_path):
        """Its own key of that name, of which ours is a relative."""
        exported, _ = export_checkpoint(checkpoints.read(start), with_dens=False)
        checkpoints.write(exported, tmp_path / "hydra.pt")
        run_settings["loss_functions"] = run_settings["loss_functions"][:2]
        del run_settings["dataset"]["train"]["transforms"]["dens"]
        run_settings["model"] = {
            "name": "hydra",
            "pass_through_head_outputs": True,
            "otf_graph": True,
            "finetune_config": {"starting_checkpoint": str(tmp_path / "hydra.pt")},
        }
        trainer = make_trainer(run_settings)
        assert trainer.fine_tuning is None
        for name, value in exported["state_dict"].items():
            assert torch.equal(trainer._unwrapped_model.state_dict()[name], value)

    def test_hydra_models_take_the_normalisers_of_the_data(self, run_settings, make_trainer):
        key = {"starting_checkpoint": "x.pt", "normalizers": "checkpoint"}
        run_settings["model"] = {"name": "hydra", "finetune_config": key}
        with pytest.raises(ValueError, match=r"'model\.finetune_config\.normalizers'.*fairchem itself"):
            make_trainer(run_settings)


@pytest.mark.slow
def test_by_the_fairchem_command(run_settings, fairchem):
    fairchem("train", run_settings, name="first")
    settings = fine_tuned(copy.deepcopy(run_settings), fairchem.file("first"))
    settings["optim"]["checkpoint_every"] = 4
    said = fairchem("train", settings, name="second")
    assert f"Fine-tuning: weights of '{fairchem.file('first')}' (step 12, in their moving average)" in said
    assert fairchem.checkpoint("second")["step"] == 12
    settings["optim"]["max_epochs"] = 3
    fairchem.file("first").unlink()
    said = fairchem("train", settings, name="second")
    assert "after step 12" in said and "Fine-tuning" not in said
    assert fairchem.checkpoint("second")["step"] == 18
    fairchem("validate", settings, "--checkpoint", str(fairchem.file("second")), name="evaluated")


class TestResuming:
    def test_weights_without_the_state_of_a_run_are_no_run(self, run_settings, make_trainer, start, tmp_path):
        imported, _ = import_checkpoint(checkpoints.read(start), average="use")
        checkpoints.write(imported, tmp_path / "weights.pt")
        trainer = make_trainer(run_settings)
        trainer.load_checkpoint(str(tmp_path / "weights.pt"))
        trainer.validate(split="val", disable_tqdm=True)
        with pytest.raises(ValueError, match=r"weights\.pt'.*cannot be resumed.*model\.finetune_config"):
            trainer.train(disable_eval_tqdm=True)

    def test_a_model_of_another_size_is_named(self, run_settings, make_trainer, start):
        run_settings["model"] |= {"lmax_list": [1], "mmax_list": [1]}
        trainer = make_trainer(run_settings)
        with pytest.raises(
            ValueError, match=r"checkpoint\.pt' \(version 1, .*lmax_list: \[2\].*lmax_list: \[1\]"
        ):
            trainer.load_checkpoint(str(start))

    def test_a_plain_model(self, run_settings, make_trainer, start, tmp_path):
        checkpoints.write(strip_checkpoint(checkpoints.read(start)).checkpoint, tmp_path / "plain.pt")
        with pytest.raises(ValueError, match=r"plain\.pt' .*Missing in the file.*plain model"):
            make_trainer(run_settings).load_checkpoint(str(tmp_path / "plain.pt"))

    def test_a_newer_version(self, run_settings, make_trainer, start, tmp_path):
        checkpoint = checkpoints.read(start)
        checkpoint["config"]["fairchem_dens"]["checkpoint_version"] = 99
        checkpoints.write(checkpoint, tmp_path / "new.pt")
        with pytest.raises(ValueError, match=r"version 99.*install a newer"):
            make_trainer(run_settings).load_checkpoint(str(tmp_path / "new.pt"))


class TestInference:
    def test_the_weights_are_the_moving_average(self, run_settings, make_trainer, start, structure):
        """As --mode validate has them."""
        inference = make_trainer(run_settings | {"dataset": {}}, inference_only=True)
        inference.load_checkpoint(str(start), inference_only=True)
        evaluated = make_trainer(run_settings, timestamp_id="evaluated")
        evaluated.load_checkpoint(str(start))
        batch = Batch.from_data_list([structure(0), structure(1)])
        one, other = (
            trainer.predict(copy.copy(batch), per_image=False, disable_tqdm=True)
            for trainer in (inference, evaluated)
        )
        assert torch.equal(one["energy"], other["energy"]) and torch.equal(one["forces"], other["forces"])
        evaluated.ema = None
        raw = evaluated.predict(copy.copy(batch), per_image=False, disable_tqdm=True)
        assert not torch.equal(one["energy"], raw["energy"])

    @pytest.mark.parametrize("handed", [True, False])
    def test_an_official_file_opens_as_it_is(self, run_settings, make_trainer, start, handed, tmp_path):
        """fairchem's calculator hands over what it has loaded; its commands hand over the name."""
        checkpoint = checkpoints.read(start)
        weights = checkpoints.weights_of(checkpoint)
        authors = {
            "state_dict": {f"module.module.{name}": value for name, value in weights.items()},
            "normalizers": {
                "target": {"mean": torch.tensor(-3.0), "std": torch.tensor(2.5)},
                "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(1.7)},
                "denoising_pos_target": {"mean": torch.tensor(0.0), "std": torch.tensor(0.1)},
            },
            "ema": checkpoint["ema"],
        }
        torch.save(authors, tmp_path / "authors.pt")
        trainer = make_trainer(run_settings | {"dataset": {}}, inference_only=True)
        given = {"checkpoint": authors} if handed else {}
        trainer.load_checkpoint(str(tmp_path / "authors.pt"), **given, inference_only=True)
        assert set(trainer.normalizers) == {"energy", "forces"}
        assert trainer.normalizers["energy"].rmsd == 2.5
        expected = checkpoints.predicting_weights(checkpoint)
        for name, value in weights_of(trainer).items():
            assert torch.equal(value, expected[name])
