"""What import, export and strip carry along, leave out and refuse; the commands; what `info` says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch_geometric.data import Batch, Data

from fairchem_dens import checkpoints
from fairchem_dens.checkpoints.convert import export_checkpoint, import_checkpoint, strip_checkpoint
from fairchem_dens.checkpoints.describe import describe
from fairchem_dens.cli.main import main
from fairchem_dens.inference import trainer_of
from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS

STORED = Path(__file__).parents[1] / "data" / "checkpoints"
EXPECTED = json.loads((STORED / "expected.json").read_text())


def stored(name: str) -> dict[str, Any]:
    return checkpoints.read_as_written(STORED / f"{name}.pt")


def predicted(checkpoint: dict[str, Any], data: Data) -> tuple[float, np.ndarray]:
    """Energy and forces in eV and eV/Å, as fairchem composes them, of the weights of a checkpoint of ours."""
    settings = {key: value for key, value in checkpoint["config"]["model"].items() if key != "name"}
    model = EquiformerV2DeNS(**settings).eval()
    checkpoints.load(checkpoints.weights_of(checkpoint), model)
    with torch.no_grad():
        outputs = model(Batch.from_data_list([data]))
    energy, forces = (checkpoint["normalizers"][target] for target in ("energy", "forces"))
    total = outputs["energy"] * energy["rmsd"] + energy["mean"]
    if "energy" in checkpoint["elementrefs"]:
        total += checkpoint["elementrefs"]["energy"]["element_references"][data.atomic_numbers].sum()
    return total.item(), (outputs["forces"] * forces["rmsd"] + forces["mean"]).numpy()


class TestImport:
    @pytest.mark.parametrize("name", ["version_0_authors", "version_0_hydra"])
    def test_total_energies_and_forces_in_physical_units(self, name, structure: Callable[..., Data]):
        imported, _ = import_checkpoint(stored(name))
        energy, forces = predicted(imported, structure(3))
        assert energy == pytest.approx(EXPECTED[f"{name}.pt"]["energy"], abs=2e-5)
        np.testing.assert_allclose(forces, EXPECTED[f"{name}.pt"]["forces"], atol=1e-5)

    def test_opens_where_the_settings_of_the_run_name_no_noise(self, tmp_path):
        """Its moving average counts the noise head, which the settings then say nothing about."""
        checkpoint = stored("version_0_authors")
        for name in [name for name in checkpoint["config"]["optim"] if "denoising_pos" in name]:
            del checkpoint["config"]["optim"][name]
        imported, _ = import_checkpoint(checkpoint)
        assert imported["ema"] is not None
        checkpoints.write(imported, tmp_path / "imported.pt")
        average = checkpoints.average_of(imported)
        model = trainer_of(tmp_path / "imported.pt", cpu=True)._unwrapped_model
        for name, value in model.named_parameters():
            assert torch.equal(value, average[name]), name

    def test_references_in_the_model_become_those_of_the_checkpoint(self):
        imported, said = import_checkpoint(stored("version_0_authors"))
        references = imported["elementrefs"]["energy"]["element_references"]
        assert references[29].item() == pytest.approx(-0.4 * 2.9) and references[3] == 0
        assert "energy_lin_ref" not in imported["state_dict"]
        assert "load_energy_lin_ref" not in imported["config"]["model"]
        assert any("turned 'energy_lin_ref'" in line and "4 elements" in line for line in said)

    def test_references_that_say_nothing_are_left_out(self):
        checkpoint = stored("version_0_authors")
        checkpoint["state_dict"]["module.module.energy_lin_ref"].zero_()
        imported, said = import_checkpoint(checkpoint)
        assert imported["elementrefs"] == {} and any("zero for all elements" in line for line in said)

    def test_references_twice(self):
        checkpoint = stored("version_0_authors")
        same = checkpoint["state_dict"]["module.module.energy_lin_ref"] * 2.9
        checkpoint["elementrefs"] = {"energy": {"element_references": same}}
        imported, said = import_checkpoint(checkpoint)
        assert torch.equal(imported["elementrefs"]["energy"]["element_references"], same)
        assert any("repeat" in line for line in said)
        checkpoint["elementrefs"] = {"energy": {"element_references": same + 1}}
        with pytest.raises(ValueError, match="cannot be told which"):
            import_checkpoint(checkpoint)

    def test_a_stress_head_is_left_out_with_all_that_is_about_it(self):
        imported, said = import_checkpoint(stored("version_0_hydra"))
        (line,) = (line for line in said if "head 'stress'" in line)
        assert "parameters" in line and "(0 " not in line
        assert any("normaliser of stress_isotropic" in line for line in said)
        config = imported["config"]
        assert "stress" not in json.dumps(config["model"])
        assert set(config["outputs"]) == {"energy", "forces"} == set(imported["normalizers"])
        assert [list(entry) for entry in config["loss_functions"]] == [["energy"], ["forces"], ["noise"]]
        assert "stress" not in config["evaluation_metrics"]["metrics"]
        assert config["dataset"]["transforms"]["dens"] == {
            "prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "all_atoms": True, "switch": "batch",
        }  # fmt: skip

    def test_nothing_changes_the_given_checkpoint(self):
        checkpoint = stored("version_0_authors")
        before = copy.deepcopy(checkpoint)
        for convert in (import_checkpoint, export_checkpoint, strip_checkpoint):
            convert(checkpoint, average="use")
        assert checkpoint["config"] == before["config"]
        for name, value in before["state_dict"].items():
            assert torch.equal(checkpoint["state_dict"][name], value)

    def test_one_of_ours_stays_and_can_still_be_resumed(self):
        imported, said = import_checkpoint(stored("version_1"))
        assert "optimizer" in imported and "already" in said[0]
        used, _ = import_checkpoint(stored("version_1"), average="use")
        assert "optimizer" not in used and used["ema"] is None
        assert {"noise": {"fn": "l2mae", "coefficient": 10}} in used["config"]["loss_functions"]
        assert used["config"]["dataset"]["transforms"]["dens"]["std"] == 0.1

    @pytest.mark.parametrize(
        ("setting", "value", "said"),
        [
            ("lmax_list", [2], r"weights are for 'lmax_list: \[1\]' and the model has 'lmax_list: \[2\]'"),
            ("sphere_channels", 4, r"sphere_embedding\.weight \(48×2 in the file, 48×4 in the model\)"),
            ("num_layers", 2, r"Missing in the file: blocks\.1"),
            ("max_radius", 5.0, r"distance_expansion\.offset.*'max_radius'"),
            ("use_noise_schedule_sigma_encoding", False, "Not in the model: noise_schedule_sigma"),
            ("lmaxlist", [1], "Unknown setting 'model.lmaxlist'"),
        ],
    )
    def test_settings_that_are_not_those_of_the_weights(self, setting, value, said):
        checkpoint = stored("version_0_authors")
        checkpoint["config"]["model_attributes"][setting] = value
        if setting == "lmax_list":
            checkpoint["config"]["model_attributes"]["grid_resolution"] = None
        with pytest.raises(ValueError, match=said):
            import_checkpoint(checkpoint)

    def test_a_file_without_configuration_takes_its_settings_from_elsewhere(self):
        checkpoint = stored("version_0_authors")
        settings = checkpoint.pop("config")["model_attributes"]
        checkpoint.pop("ema")
        with pytest.raises(ValueError, match=r"'config\.model'.*--config-yml"):
            import_checkpoint(checkpoint)
        imported, said = import_checkpoint(checkpoint, model={"name": "equiformer_v2_dens", **settings})
        assert imported["config"]["model"]["num_layers"] == 1
        assert "there is no moving average of the weights" in said
        assert set(imported["config"]["outputs"]) == {"energy", "forces"}

    def test_a_fine_tuned_hydra_takes_its_backbone_from_elsewhere(self):
        """Its file names the backbone's checkpoint and not its settings."""
        checkpoint = stored("version_0_hydra")
        whole = checkpoint["config"]["model"]
        checkpoint["config"]["model"] = {
            "name": "hydra",
            "finetune_config": {"starting_checkpoint": "before.pt"},
            "heads": whole["heads"],
        }
        with pytest.raises(ValueError, match=r"'before\.pt'.*--config-yml"):
            import_checkpoint(checkpoint)
        imported, _ = import_checkpoint(checkpoint, model=whole)
        expected, _ = import_checkpoint(stored("version_0_hydra"))
        assert imported["config"]["model"] == expected["config"]["model"]
        for name, value in expected["state_dict"].items():
            assert torch.equal(imported["state_dict"][name], value)

    def test_a_frozen_backbone_is_its_own_average(self):
        checkpoint = stored("version_0_hydra")
        checkpoint["config"]["model"]["freeze_backbone"] = True
        names = [name for name, _ in _parameters(checkpoint)]
        heads = [i for i, name in enumerate(names) if name.startswith("output_heads.")]
        checkpoint["ema"]["shadow_params"] = [checkpoint["ema"]["shadow_params"][i] for i in heads]
        imported, _ = import_checkpoint(checkpoint, average="use")
        raw, _ = import_checkpoint(checkpoint, average="drop")
        for name, value in imported["state_dict"].items():
            is_head = "_block." in name and not name.startswith("blocks.")
            torch.testing.assert_close(value, raw["state_dict"][name] * (1.02 if is_head else 1.0))

    def test_another_model(self):
        with pytest.raises(ValueError, match=r"not of EquiformerV2, eSCN or Equiformer.*encoder\.weight"):
            import_checkpoint({"state_dict": {"encoder.weight": torch.zeros(2)}})

    def test_a_plain_model_gets_dens_only_if_asked(self, structure: Callable[..., Data]):
        plain, _ = strip_checkpoint(stored("version_0_authors"))
        with pytest.raises(ValueError, match=r"plain model.*--new-dens"):
            import_checkpoint(plain)
        first, said = import_checkpoint(plain, new_dens=True)
        assert any("not trained" in line for line in said)
        assert not first["state_dict"]["force_embedding.bias"].any()
        assert first["state_dict"]["force_embedding.weight"].any()
        energy, forces = predicted(first, structure(3))
        assert energy == pytest.approx(EXPECTED["version_0_authors.pt"]["energy"], abs=2e-5)
        np.testing.assert_allclose(forces, EXPECTED["version_0_authors.pt"]["forces"], atol=1e-5)
        torch.manual_seed(11)
        again, _ = import_checkpoint(plain, new_dens=True)
        for name, value in first["state_dict"].items():
            assert torch.equal(again["state_dict"][name], value), "the same each time"
        assert len(first["ema"]["shadow_params"]) == len(first["state_dict"])

    def test_settings_of_dens_that_contradict_each_other_do_not_keep_the_weights_back(self):
        checkpoint = stored("version_0_authors")
        del checkpoint["config"]["optim"]["denoising_pos_coefficient"]
        _, said = import_checkpoint(checkpoint)
        assert any("denoising_pos_coefficient" in line for line in said)

    def test_equiformer_of_md17(self):
        """Its layout is ours; files of the authors' code have no configuration."""
        small = {
            "irreps_equivariant_inputs": "1x0e+1x1e", "irreps_node_embedding": "4x0e+2x1e", "num_layers": 1,
            "irreps_sh": "1x0e+1x1e", "number_of_basis": 4, "fc_neurons": [4, 4],
            "irreps_feature": "4x0e+2x1e", "irreps_head": "2x0e+1x1e", "num_heads": 2,
            "irreps_pre_attn": "4x0e+2x1e", "irreps_mlp_mid": "4x0e+2x1e",
        }  # fmt: skip
        weights = EquiformerDeNS(**small).state_dict()
        constant = {"rbf.means": EquiformerDeNS(**small).rbf.means}
        imported, _ = import_checkpoint({"state_dict": weights | constant}, model=small)
        assert imported["config"]["model"]["name"] == "fairchem_dens.models.EquiformerDeNS"
        assert imported["state_dict"].keys() == weights.keys()
        with pytest.raises(ValueError, match="no equiformer like that of the paper"):
            strip_checkpoint(imported)


def _parameters(checkpoint: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    from fairchem_dens.models.state import is_constant

    weights = checkpoints.weights_of(checkpoint)
    return [(name, value) for name, value in weights.items() if not is_constant(name)]


class TestExportAndStrip:
    @pytest.mark.parametrize("convert", [export_checkpoint, strip_checkpoint])
    def test_what_stock_fairchem_gets(self, convert):
        exported, _ = convert(stored("version_0_authors"))
        config = exported["config"]
        assert config["trainer"] == "equiformerv2_forces"
        assert "fairchem_dens" not in json.dumps(config) and "dens" not in config["dataset"]["transforms"]
        assert "noise" not in json.dumps(config["loss_functions"])
        assert exported["elementrefs"]["energy"]["element_references"][29].item() == pytest.approx(-0.4 * 2.9)
        assert not any("energy_lin_ref" in name for name in exported["state_dict"])

    @pytest.mark.parametrize("convert", [export_checkpoint, strip_checkpoint])
    def test_stock_calculator_gives_the_physical_units(self, convert, tmp_path, structure, monkeypatch):
        """fairchem's own trainer and model, from nothing but the file; frames at random, so to 1e-3."""
        from ase import Atoms
        from fairchem.core import OCPCalculator

        exported, _ = convert(stored("version_0_hydra"))
        checkpoints.write(exported, tmp_path / "stock.pt")
        data = structure(3)
        atoms = Atoms(data.atomic_numbers.numpy(), data.pos.numpy(), cell=data.cell[0].numpy(), pbc=True)
        atoms.calc = OCPCalculator(checkpoint_path=str(tmp_path / "stock.pt"), cpu=True, seed=0)
        assert type(atoms.calc.trainer).__module__.startswith("fairchem.core")
        expected = EXPECTED["version_0_hydra.pt"]
        assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-3)
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-2)

    def test_what_fairchem_cannot_do_is_refused(self, model_settings):
        checkpoint, _ = import_checkpoint(stored("version_1"))
        checkpoint["config"]["model"]["regress_forces"] = False
        with pytest.raises(ValueError, match=r"do not fit|force head"):
            export_checkpoint(checkpoint)

    def test_escn_without_strict_neighbours(self):
        from fairchem_dens.models import ESCNDeNS

        settings: dict[str, Any] = {
            "num_layers": 1, "lmax_list": [1], "mmax_list": [1], "sphere_channels": 2, "hidden_channels": 2,
            "edge_channels": 2, "num_sphere_samples": 4, "max_num_elements": 10, "cutoff": 3.0,
            "enforce_max_neighbors_strictly": False,
        }  # fmt: skip
        checkpoint = {"state_dict": ESCNDeNS(**settings).state_dict()}
        imported, _ = import_checkpoint(checkpoint, model=settings)
        with pytest.raises(ValueError, match=r"eSCN has no 'model\.enforce_max_neighbors_strictly'"):
            strip_checkpoint(imported)


class TestCommands:
    def test_from_the_authors_to_fairchem_and_back(self, tmp_path, capsys, structure):
        authors = str(STORED / "version_0_authors.pt")
        ours, hydra, back, plain = (
            str(tmp_path / f"{name}.pt") for name in ("ours", "hydra", "back", "plain")
        )
        for words in (
            ["import", authors, ours],
            ["export", ours, hydra],
            ["import", hydra, back],
            ["strip", ours, plain, "--ema", "use"],
            ["export", ours, str(tmp_path / "p.pt"), "--plain", "--ema", "drop"],
        ):
            assert main(["checkpoint", *words]) == 0
            said = capsys.readouterr().out
            assert f"wrote {words[2]}" in said and "next: " in said and "OUT.pt" not in said
        for name, value in checkpoints.read(ours)["state_dict"].items():
            assert torch.equal(checkpoints.read(back)["state_dict"][name], value)
        energy, _ = predicted(checkpoints.read(back), structure(3))
        assert energy == pytest.approx(EXPECTED["version_0_authors.pt"]["energy"], abs=2e-5)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "back.pt", "hydra.pt", "ours.pt", "p.pt", "plain.pt",
        ]  # fmt: skip

    def test_a_yaml_for_the_settings(self, tmp_path, capsys):
        checkpoint = stored("version_0_authors")
        settings = checkpoint.pop("config")["model_attributes"]
        checkpoint.pop("ema")
        torch.save(checkpoint, tmp_path / "bare.pt")
        (tmp_path / "model.yml").write_text(
            yaml.safe_dump({"model": {"name": "equiformer_v2_dens", **settings}})
        )
        (tmp_path / "run.yml").write_text("includes: [model.yml]\n")
        words = ["checkpoint", "import", str(tmp_path / "bare.pt"), str(tmp_path / "out.pt"), "--config-yml"]
        assert main([*words, str(tmp_path / "absent.yml")]) == 2
        assert "absent.yml" in capsys.readouterr().err
        assert main([*words, str(STORED / "expected.json")]) == 2
        assert "no 'model'" in capsys.readouterr().err
        import os

        before = Path.cwd()
        os.chdir(tmp_path)
        try:
            assert main([*words, str(tmp_path / "run.yml")]) == 0
        finally:
            os.chdir(before)

    def test_errors_name_the_file(self, tmp_path, capsys):
        plain, _ = strip_checkpoint(stored("version_0_authors"))
        checkpoints.write(plain, tmp_path / "plain.pt")
        assert main(["checkpoint", "import", str(tmp_path / "plain.pt"), str(tmp_path / "out.pt")]) == 2
        error = capsys.readouterr().err
        assert "plain.pt': It is of a plain model" in error and error.count("plain.pt") == 1
        assert main(["checkpoint", "strip", str(STORED / "version_1.pt"), str(tmp_path / "plain.pt")]) == 2
        assert "exists already" in capsys.readouterr().err


class TestInfo:
    def test_of_ours(self, capsys):
        assert main(["checkpoint", "info", str(STORED / "version_1.pt")]) == 0
        said = capsys.readouterr().out
        for words in (
            "version          1 (fairchem_dens ",
            "flat, equiformer_v2, with DeNS",
            "fairchem_dens.models.EquiformerV2DeNS (lmax 1, mmax 1, num_layers 1, sphere_channels 2",
            "step 2, epoch 1",
            "energy: mean 0.1, rmsd 1.2; forces: mean 0, rmsd 0.7",
            "moving average   yes, decay 0.9",
            "optimizer        yes, schedule",
            "to resume      yes: fairchem --mode train --checkpoint",
            "to fine-tune   yes: 'model.finetune_config'",
            "for inference  yes",
        ):
            assert words in said

    def test_json_of_all_versions(self, capsys):
        files = [str(STORED / name) for name in EXPECTED]
        assert main(["checkpoint", "info", "--json", *files]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found) == files
        authors, hydra, ours = (found[str(STORED / f"{name}.pt")] for name in
                                ("version_0_authors", "version_0_hydra", "version_1"))  # fmt: skip
        assert (authors["version"], hydra["version"], ours["version"]) == (0, 0, 1)
        assert authors["lmax"] == hydra["lmax"] == ours["lmax"] == 1 and authors["mmax"] == hydra["mmax"] == 1
        assert authors["references_in_model"] and not ours["references_in_model"]
        assert hydra["element_references"] == {"energy": 4} and hydra["heads"] == [
            "energy",
            "forces",
            "stress",
        ]
        assert authors["normalizers"]["energy"] == {"mean": [-0.75], "rmsd": [pytest.approx(2.9)]}
        settings = stored("version_1")["config"]["model"]
        model = EquiformerV2DeNS(**{key: value for key, value in settings.items() if key != "name"})
        assert ours["parameters"] == model.num_params and ours["constants"] == 0
        assert authors["starts"]["resume"].startswith("no") and "import" in authors["starts"]["fine-tune"]
        assert ours["starts"]["resume"].startswith("yes")

    def test_of_what_is_not_ours(self):
        plain, _ = strip_checkpoint(stored("version_0_authors"), average="use")
        found = describe(plain)
        assert found["layout"].endswith("without DeNS") and "--new-dens" in found["starts"]["fine-tune"]
        assert found["moving_average"] is None and not found["optimizer"]
        bare = describe({"state_dict": {"encoder.weight": torch.zeros(2, 3)}})
        assert (
            bare["parameters"] == 6 and bare["model"] is None and bare["starts"]["inference"].startswith("no")
        )
        no_settings = describe({"state_dict": stored("version_0_authors")["state_dict"]})
        assert "--config-yml" in no_settings["starts"]["fine-tune"]
