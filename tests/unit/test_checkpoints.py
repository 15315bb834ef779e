"""Reading checkpoints that may be anything; versions; weights and their average by name; layouts."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from fairchem_dens import checkpoints
from fairchem_dens.checkpoints import files, versions
from fairchem_dens.checkpoints.fit import misfit
from fairchem_dens.checkpoints.layouts import flat_settings, flattened, recognised, with_heads
from fairchem_dens.cli.main import main
from fairchem_dens.models import EquiformerV2DeNS

STORED = Path(__file__).parents[1] / "data" / "checkpoints"
EXPECTED = json.loads((STORED / "expected.json").read_text())


class WritesAFile:
    """What a malicious file holds: unpickling it runs a command."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.fixture
def model(model_settings: dict[str, Any]) -> EquiformerV2DeNS:
    return EquiformerV2DeNS(**model_settings).eval()


class TestReading:
    @pytest.mark.parametrize("command", ["info", "import", "export", "strip"])
    @pytest.mark.parametrize("place", ["beside the weights", "instead of them", "a bare pickle"])
    def test_a_malicious_file_is_refused_and_not_run(self, tmp_path, capsys, command, place):
        victim, file = tmp_path / "victim", tmp_path / "bad.pt"
        bad = WritesAFile(victim)
        if place == "a bare pickle":
            file.write_bytes(pickle.dumps({"state_dict": bad}, protocol=2))
        else:
            weights = {"w": torch.zeros(2)} if place == "beside the weights" else bad
            torch.save({"state_dict": weights, "config": {"x": bad}}, file)
        out = [] if command == "info" else [str(tmp_path / "out.pt")]
        assert main(["checkpoint", command, str(file), *out]) == 2
        error = capsys.readouterr().err
        assert "bad.pt" in error and "Nothing of it was run" in error and "system" in error
        assert "add_safe_globals" not in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]

    def test_the_malicious_file_would_have_run(self, tmp_path):
        """Else the test above would show nothing."""
        victim, file = tmp_path / "victim", tmp_path / "bad.pt"
        torch.save({"state_dict": WritesAFile(victim)}, file)
        torch.load(file, weights_only=False)
        assert victim.is_file()

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
    def test_a_truncated_file(self, tmp_path, share):
        whole = (STORED / "version_1.pt").read_bytes()
        file = tmp_path / "half.pt"
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"half\.pt' cannot be read as a checkpoint: it is damaged"):
            checkpoints.read(file)

    @pytest.mark.parametrize(
        "content",
        [b"model:\n  name: x\n" * 40, bytes(range(256)) * 8, b"\x80\x04]"],
        ids=["yaml", "bytes", "pickle"],
    )
    def test_something_else(self, tmp_path, content):
        file = tmp_path / "other.pt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.pt' cannot be read as a checkpoint"):
            checkpoints.read(file)

    @pytest.mark.parametrize(
        "content", [{"weights": 1}, [1, 2], {"state_dict": {}}, {"state_dict": {"w": 1.0}}, torch.zeros(2)]
    )
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="no 'state_dict' with weights"):
            checkpoints.read(tmp_path / "other.pt")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*absent\.pt'"):
            checkpoints.read(tmp_path / "absent.pt")

    def test_numbers_of_numpy_and_paths_are_harmless(self, tmp_path):
        """fairchem leaves them in configurations and metrics."""
        config = {
            "src": pathlib.Path("/data"),
            "mean": np.float64(0.5),
            "n": np.int64(3),
            "on": np.bool_(True),
        }
        before = set(torch.serialization.get_safe_globals())
        torch.save({"state_dict": {"w": torch.zeros(2)}, "config": config}, tmp_path / "np.pt")
        assert checkpoints.read(tmp_path / "np.pt")["config"]["mean"] == 0.5
        assert set(torch.serialization.get_safe_globals()) == before
        checkpoints.write(checkpoints.read(tmp_path / "np.pt"), tmp_path / "plain.pt")
        again = torch.load(tmp_path / "plain.pt", weights_only=True)["config"]
        assert again["src"] == "/data" and type(again["mean"]) is float and again["on"] is True

    def test_writing_replaces_nothing_and_leaves_nothing(self, tmp_path, monkeypatch):
        checkpoints.write({"a": 1}, tmp_path / "a.pt")
        with pytest.raises(FileExistsError, match=r"a\.pt' exists already"):
            checkpoints.write({"a": 2}, tmp_path / "a.pt")
        with pytest.raises(FileNotFoundError, match="no folder"):
            checkpoints.write({"a": 2}, tmp_path / "none" / "a.pt")

        def killed(*_: Any) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(files, "put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write({"a": 3}, tmp_path / "b.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class TestVersions:
    @pytest.mark.parametrize("name", EXPECTED)
    def test_stored_files_are_read_as_the_current_version(self, name):
        written = checkpoints.read_as_written(STORED / name)
        assert checkpoints.version_of(written) == int(name.removeprefix("version_")[0])
        current = checkpoints.read(STORED / name)
        assert checkpoints.version_of(current) == checkpoints.CHECKPOINT_VERSION
        assert {"energy", "forces"} <= set(current["normalizers"])
        assert "denoising_pos_target" not in current["normalizers"]
        for state in current["normalizers"].values():
            assert set(state) == {"mean", "rmsd"}
        assert current["config"]["model"]["name"]
        assert {"energy", "forces"} == set(current["config"]["outputs"]) - {"stress"}

    def test_there_is_a_stored_file_of_each_version(self):
        stored = {checkpoints.version_of(checkpoints.read_as_written(STORED / name)) for name in EXPECTED}
        assert stored == set(range(checkpoints.CHECKPOINT_VERSION + 1))

    def test_upgrading_changes_neither_the_given_checkpoint_nor_one_of_the_current_version(self):
        written = checkpoints.read_as_written(STORED / "version_0_authors.pt")
        checkpoints.upgraded(written)
        assert set(written["normalizers"]) == {"target", "grad_target", "denoising_pos_target"}
        assert written["config"]["model"] == "equiformer_v2_dens" and "fairchem_dens" not in written["config"]
        current = checkpoints.read_as_written(STORED / "version_1.pt")
        assert checkpoints.upgraded(current) is current

    def test_upgrades_go_one_step_at_a_time(self, monkeypatch):
        def to_2(checkpoint: dict[str, Any]) -> dict[str, Any]:
            assert set(checkpoint["normalizers"]) == {"energy", "forces"}, "the first step comes first"
            return {**checkpoint, "new": 1, "config": {versions.MARK: {"checkpoint_version": 2}}}

        monkeypatch.setattr(versions, "CHECKPOINT_VERSION", 2)
        monkeypatch.setitem(versions._UPGRADES, 1, to_2)
        upgraded = checkpoints.upgraded(checkpoints.read_as_written(STORED / "version_0_authors.pt"))
        assert upgraded["new"] == 1 and checkpoints.version_of(upgraded) == 2

    def test_a_newer_version_is_refused(self, tmp_path):
        newer = checkpoints.CHECKPOINT_VERSION + 1
        config = {"fairchem_dens": {"checkpoint_version": newer}}
        torch.save({"state_dict": {"w": torch.zeros(1)}, "config": config}, tmp_path / "new.pt")
        with pytest.raises(ValueError, match=rf"new\.pt' has checkpoint version {newer}, .*install a newer"):
            checkpoints.read(tmp_path / "new.pt")
        with pytest.raises(ValueError, match=f"has version {newer}"):
            checkpoints.upgraded({"config": config})

    @pytest.mark.parametrize("version", ["1", 1.5, True, -1, None])
    def test_a_version_that_is_none(self, version):
        with pytest.raises(ValueError, match="must be a whole number"):
            checkpoints.version_of({"config": {"fairchem_dens": {"checkpoint_version": version}}})

    def test_a_configuration_that_fairchem_cannot_read_is_left(self):
        config = {"task": {"dataset": "something"}, "model": {"name": "m"}}
        upgraded = checkpoints.upgraded({"state_dict": {"w": torch.zeros(1)}, "config": config})
        assert upgraded["config"]["task"] == {"dataset": "something"}


class TestWeights:
    @pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
    def test_names_without_wrappers(self, prefix):
        checkpoint = {"state_dict": {f"{prefix}module_list.weight": torch.zeros(1)}}
        assert list(checkpoints.weights_of(checkpoint)) == ["module_list.weight"]

    @pytest.mark.parametrize("name", EXPECTED)
    def test_the_average_goes_by_name(self, name):
        """The stored averages of version 0 are 1.02 times the weights."""
        checkpoint = checkpoints.read(STORED / name)
        weights, average = checkpoints.weights_of(checkpoint), checkpoints.average_of(checkpoint)
        assert average is not None and list(average) == list(weights)
        shadow = checkpoint["ema"]["shadow_params"]
        resting = [key for key, value in weights.items() if torch.equal(value, average[key]) and value.any()]
        assert sum(value.numel() for value in shadow) <= sum(value.numel() for value in weights.values())
        if name.startswith("version_0"):
            assert all("SO3" in key or "map" in key or "offset" in key or "expand_index" in key
                       or "lin_ref" in key or "balance" in key for key in resting)  # fmt: skip
            for key in ("sphere_embedding.weight", "force_embedding.bias", "denoising_pos_block.proj.weight"):
                found = next(full for full in weights if full.endswith(key))
                torch.testing.assert_close(average[found], 1.02 * weights[found])
        assert checkpoints.predicting_weights(checkpoint).keys() == weights.keys()

    def test_a_noise_head_at_rest_is_its_own_average(self, model_settings):
        model = EquiformerV2DeNS(**model_settings, predict_noise=False)
        trained = checkpoints.trained_names(model)
        assert not any(name.startswith("denoising_pos_block") for name in trained)
        checkpoint = {
            "state_dict": model.state_dict(),
            "config": {"model": {"predict_noise": False}},
            "ema": {"shadow_params": [model.state_dict()[name] + 1 for name in trained]},
        }
        average = checkpoints.average_of(checkpoint)
        assert average is not None
        for name, value in model.state_dict().items():
            assert torch.equal(average[name], value + (name in trained))

    def test_an_average_of_something_else_is_refused(self, model):
        shadow = list(model.parameters())[1:]
        checkpoint = {"state_dict": model.state_dict(), "config": {}, "ema": {"shadow_params": shadow}}
        with pytest.raises(ValueError, match=f"{len(shadow)} entries.* its {len(shadow) + 1} trained"):
            checkpoints.average_of(checkpoint)


class TestLayouts:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("version_0_authors.pt", "flat, equiformer_v2, with DeNS"),
            ("version_0_hydra.pt", "hydra (backbone and heads), equiformer_v2, with DeNS"),
            ("version_1.pt", "flat, equiformer_v2, with DeNS"),
        ],
    )
    def test_recognised(self, name, said):
        assert str(recognised(checkpoints.weights_of(checkpoints.read(STORED / name)))) == said

    def test_unknown_and_plain(self, model):
        assert recognised(["encoder.weight"]).family is None
        plain = [name for name in model.state_dict() if "force_embedding" not in name]
        assert recognised(plain).family == "equiformer_v2" and not recognised(plain).has_dens

    def test_to_heads_and_back(self, model):
        blocks = {"energy_block": "energy.scalar_block", "force_block": "forces.vector_block"}
        moved = with_heads(model.state_dict(), blocks)
        assert all(name.startswith(("backbone.", "output_heads.")) for name in moved)
        moved["output_heads.stress.block.weight"] = torch.zeros(3, 2)
        flat, left_out = flattened(moved)
        assert list(flat) == list(model.state_dict()) and left_out == {"stress": 6}

    def test_two_heads_for_the_same(self, model):
        moved = with_heads(model.state_dict(), {"energy_block": "oc20.energy_block"})
        moved |= {name.replace("oc20", "oc22"): value for name, value in moved.items() if "oc20" in name}
        with pytest.raises(ValueError, match="'oc20' and 'oc22' predict the same"):
            flattened(moved)

    def test_settings_of_backbone_and_heads(self):
        backbone = {"model": "equiformer_v2_dens_backbone", "num_layers": 2, "use_pbc_single": True}
        heads = {"energy": {"module": "eqV2_DeNS_scalar_head", "use_denoising": False}}
        found = flat_settings({"name": "hydra", "backbone": backbone, "heads": heads})
        assert found == ("equiformer_v2_dens_backbone", {"num_layers": 2, "use_denoising_energy": False})
        heads["energy"]["reduce"] = "mean"
        with pytest.raises(ValueError, match="'energy' has 'reduce: mean'"):
            flat_settings({"name": "hydra", "backbone": backbone, "heads": heads})

    def test_a_fine_tuned_hydra_names_where_its_backbone_is(self):
        model = {"name": "hydra", "finetune_config": {"starting_checkpoint": "old.pt"}, "heads": {}}
        with pytest.raises(ValueError, match=r"names no backbone.*'old\.pt'.*--config-yml"):
            flat_settings(model)


class TestFit:
    def test_nothing_is_said_of_what_fits(self, model):
        assert misfit(model.state_dict(), model) is None
        constants = {"SO3_grid.0.0.to_grid_mat": torch.zeros(1)}
        assert misfit(model.state_dict() | constants, model) is None

    def test_names_the_first_on_both_sides(self, model):
        weights = {name.replace("norm.", "nrom."): value for name, value in model.state_dict().items()}
        said = misfit(weights, model)
        assert said is not None
        assert "Missing in the file: " in said and "norm." in said.split("Not in the model")[0]
        assert "nrom." in said.split("Not in the model")[1]

    def test_another_lmax(self, model, model_settings):
        other = EquiformerV2DeNS(
            **model_settings | {"lmax_list": [3], "mmax_list": [2], "grid_resolution": 8}
        )
        said = misfit(other.state_dict(), model)
        assert said is not None
        assert "weights are for 'lmax_list: [3]' and the model has 'lmax_list: [2]'" in said
        assert "force_embedding.weight" in said or " more" in said

    def test_names_settings_versions_and_file(self, model, model_settings):
        other = EquiformerV2DeNS(**model_settings | {"sphere_channels": 4})
        config = {
            "model": {"name": "x", "sphere_channels": 4, "num_layers": 1},
            "fairchem_dens": {"version": "0.0.9", "checkpoint_version": 1},
        }
        with pytest.raises(ValueError, match="does not fit") as raised:
            checkpoints.require_fit(
                {"state_dict": other.state_dict(), "config": config}, model, model_settings, "file.pt"
            )
        said = str(raised.value)
        for words in (
            "'file.pt' (version 1, written by fairchem_dens 0.0.9)",
            f"version {checkpoints.CHECKPOINT_VERSION}, fairchem_dens ",
            "sphere_embedding.weight (90×4 in the file, 90×8 in the model)",
            "'sphere_channels' is 4 in the file and 8 in the model",
        ):
            assert words in said
        assert "num_layers" not in said

    def test_a_plain_model(self, model):
        plain = {name: value for name, value in model.state_dict().items() if name.split(".")[0] not in
                 ("force_embedding", "denoising_pos_block")}  # fmt: skip
        with pytest.raises(ValueError, match=r"Missing.*force_embedding.*plain model.*--new-dens"):
            checkpoints.require_fit({"state_dict": plain, "config": {}}, model, {}, "plain.pt")

    def test_dens_for_a_plain_model(self, model):
        plain = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"Missing in the file: weight, bias.*checkpoint strip"):
            checkpoints.require_fit({"state_dict": model.state_dict(), "config": {}}, plain, {}, "dens.pt")

    def test_a_hydra_model(self, model):
        hydra = with_heads(model.state_dict(), {})
        with pytest.raises(ValueError, match="hydra layout: make `fairchem-dens checkpoint import`"):
            checkpoints.require_fit({"state_dict": hydra, "config": {}}, model, {}, "hydra.pt")


def test_a_stored_file_of_ours_predicts_what_it_did(structure: Callable[..., Data]) -> None:
    checkpoint = checkpoints.read(STORED / "version_1.pt")
    settings = {key: value for key, value in checkpoint["config"]["model"].items() if key != "name"}
    model = EquiformerV2DeNS(**settings).eval()
    checkpoints.load(checkpoints.predicting_weights(checkpoint), model)
    with torch.no_grad():
        outputs = model(Batch.from_data_list([structure(3)]))
    scale = {target: state["rmsd"] for target, state in checkpoint["normalizers"].items()}
    energy = outputs["energy"] * scale["energy"] + checkpoint["normalizers"]["energy"]["mean"]
    expected = EXPECTED["version_1.pt"]
    assert energy.item() == pytest.approx(expected["energy"], abs=1e-5)
    np.testing.assert_allclose(outputs["forces"] * scale["forces"], expected["forces"], atol=1e-5)
