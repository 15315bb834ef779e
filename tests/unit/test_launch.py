"""What is mended in fairchem's launcher, and `fairchem-dens submit` where there is no SLURM."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fairchem.core._cli import Runner
from fairchem.core.common import distutils, utils
from submitit.helpers import DelayedSubmission
from torch.utils.data import Subset, TensorDataset

from fairchem_dens.cli.main import main
from fairchem_dens.data.reader import LazyLmdbDataset
from fairchem_dens.launch import mends, workers
from fairchem_dens.launch.partitions import check_partition
from fairchem_dens.launch.world import World, WrittenBatch, written_batch
from fairchem_dens.shipped import configs_folder, run_names


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """fairchem's `main` adds handlers to the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def run_yml(tmp_path: Path, run_settings: dict[str, Any]) -> Path:
    """A run with an opening comment."""
    yml = tmp_path / "run.yml"
    yml.write_text("# A run.\n#   batch       4 per GPU × 16 GPUs = 64\n" + yaml.safe_dump(run_settings))
    return yml


class TestMends:
    def test_sweeps_are_read_again(self, tmp_path: Path) -> None:
        mends.mend()
        sweep = tmp_path / "sweep.yml"
        sweep.write_text("optim:\n  lr_initial: [0.1, 0.2]\n  batch_size: [4, 8]\n")
        grid = utils.create_grid({"identifier": "x", "optim": {"lr_initial": 1, "batch_size": 1}}, sweep)
        found = [(run["optim"]["lr_initial"], run["optim"]["batch_size"]) for run in grid]
        assert found == [(0.1, 4), (0.1, 8), (0.2, 4), (0.2, 8)]
        assert grid[3]["identifier"] == "x_run3"

    def test_mending_twice_is_mending_once(self) -> None:
        mends.mend()
        setup = distutils.setup
        mends.mend()
        assert distutils.setup is setup

    def test_ranks_of_a_job_meet_where_nothing_else_is_put_by_chance(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = {}
        for number in range(200):
            monkeypatch.setenv("SLURM_JOB_ID", str(number))
            found[number] = mends._meeting_port(world_size=4)
            assert mends._meeting_port(world_size=4) == found[number]
        assert all(20000 <= port < 32768 for port in found.values())
        assert len(set(found.values())) > 190
        # A rank that is alone needs no agreement: it takes a port that is free now.
        with socket.socket() as taken:
            taken.bind(("", 0))
            assert mends._meeting_port(world_size=1) != taken.getsockname()[1]

    def test_preempted_before_there_is_a_trainer(self) -> None:
        mends._keep_checkpoints_of_loading_jobs()
        config = {"checkpoint": None, "timestamp_id": None}
        submission = Runner().checkpoint(config)
        assert isinstance(submission, DelayedSubmission)
        assert isinstance(submission.function, Runner) and submission.args == (config,)

    def test_preempted_while_loading_leaves_the_file_alone(
        self, make_trainer: Any, run_settings: Any
    ) -> None:
        mends._keep_checkpoints_of_loading_jobs()
        runner = Runner()
        runner.trainer = make_trainer(run_settings)
        (submitted,) = runner.checkpoint({"checkpoint": "given.pt", "timestamp_id": None}).args
        assert submitted == {"checkpoint": "given.pt", "timestamp_id": "test"}
        assert not list(Path(runner.trainer.config["cmd"]["checkpoint_dir"]).glob("*checkpoint*"))


class TestWorld:
    def test_arithmetic(self) -> None:
        world = World(nodes=2, ranks_per_node=8, batch_size=4)
        assert (world.ranks, world.global_batch) == (16, 64)
        assert world.arithmetic() == "2 nodes × 8 GPUs × 4 structures = 64"
        assert (
            World(nodes=1, ranks_per_node=1, batch_size=1).arithmetic() == "1 node × 1 GPU × 1 structure = 1"
        )

    @pytest.mark.parametrize("wrong", ["nodes", "ranks_per_node", "batch_size"])
    def test_nothing_is_refused(self, wrong: str) -> None:
        with pytest.raises(ValueError, match="must be a whole number from 1, found 0"):
            World(**{"nodes": 1, "ranks_per_node": 1, "batch_size": 1} | {wrong: 0})

    def test_warning_says_what_makes_the_batches_equal(self) -> None:
        written = WrittenBatch(batch_size=4, gpus=16)
        assert written.warning(World(nodes=1, ranks_per_node=8, batch_size=8)) is None
        warning = written.warning(World(nodes=1, ranks_per_node=8, batch_size=4))
        assert warning is not None and "is 32" in warning and "--optim.batch_size=8" in warning
        warning = written.warning(World(nodes=1, ranks_per_node=6, batch_size=4))
        assert warning is not None and "6 ranks cannot have" in warning

    def test_each_shipped_run_states_its_batch(self) -> None:
        for name in run_names():
            if not name.startswith("demo/"):
                assert written_batch(configs_folder() / name) is not None, name


class TestSubmit:
    def test_dry_run(self, run_yml: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = [
            "--config-yml",
            str(run_yml),
            "--num-nodes",
            "2",
            "--num-gpus",
            "4",
            "--slurm-mem",
            "480",
        ]
        arguments += ["--logdir", str(tmp_path / "logs"), "--identifier", "name", "--slurm.constraint=h100"]
        assert main(["submit", "--dry-run", *arguments, "--optim.num_workers=2"]) == 0
        said = capsys.readouterr()
        assert "2 nodes × 4 GPUs × 4 structures = 32" in said.out
        for option in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=3", "mem=480GB"):
            assert f"\n#SBATCH --{option}\n" in said.out
        assert "#SBATCH --constraint=h100\n" in said.out and "#SBATCH --job-name=name\n" in said.out
        assert "-m submitit.core._submit" in said.out and "array" not in said.out
        assert "warning: the global batch is 32" in said.err and "--optim.batch_size=8" in said.err
        assert not (tmp_path / "logs").exists()

    def test_dry_run_of_a_sweep(self, run_yml: Path, capsys: Any, tmp_path: Path) -> None:
        mends.mend()
        sweep = tmp_path / "sweep.yml"
        sweep.write_text("optim:\n  batch_size: [4, 64]\n")
        arguments = ["--config-yml", str(run_yml), "--sweep-yml", str(sweep), "--timestamp-id", "one"]
        assert main(["submit", "--dry-run", *arguments]) == 0
        said = capsys.readouterr()
        assert "1 GPU × 4 structures = 4\n" in said.out and "1 GPU × 64 structures = 64\n" in said.out
        assert "#SBATCH --array=0-1%2\n" in said.out
        assert "is 4, but" in said.err and "is 64, but" not in said.err and "one name for 2 jobs" in said.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config-yml", "absent.yml"], "'absent.yml', which is not a file"),
            (["--config-yml", "RUN", "--sweep-yml", "absent.yml"], "--sweep-yml names 'absent.yml'"),
            (["--config-yml", "RUN", "--num-nodes", "0"], "'--num-nodes' must be a whole number from 1"),
            (["--config-yml", "RUN", "--optim.batch_size"], "'--optim.batch_size' is neither an option"),
            (["--config-yml", "RUN", "--optim.num_workers=-1"], "'optim.num_workers' must be a whole number"),
            (["--config-yml", "RUN", "--gp-gpus", "2"], "graph parallelism is not supported"),
            (["--config-yml", "RUN", "--dataset.train.src=$NO_SUCH_PLACE"], "NO_SUCH_PLACE is not set"),
        ],
    )
    def test_mistakes_are_told_at_once(
        self, run_yml: Path, capsys: Any, arguments: list[str], message: str
    ) -> None:
        arguments = [str(run_yml) if argument == "RUN" else argument for argument in arguments]
        assert main(["submit", "--dry-run", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_settings_of_slurm_replace_those_of_fairchem(self, run_yml: Path, capsys: Any) -> None:
        settings = ["--slurm.gpus_per_node=0", "--slurm.signal=USR2@300"]
        assert main(["submit", "--dry-run", "--cpu", "--config-yml", str(run_yml), *settings]) == 0
        said = capsys.readouterr().out
        assert said.count("gpus-per-node") == 1 and "#SBATCH --gpus-per-node=0\n" in said
        assert said.count("--signal") == 1 and "#SBATCH --signal=USR2@300\n" in said

    def test_without_slurm(self, run_yml: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert main(["submit", "--config-yml", str(run_yml)]) == 2
        assert "There is no sbatch here" in capsys.readouterr().err


class TestPartitions:
    @pytest.fixture
    def sinfo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def answers(*partitions: str) -> None:
            program = tmp_path / "sinfo"
            program.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{name}'" for name in partitions))
            program.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

        return answers

    def test_known_unknown_and_default(self, sinfo: Any) -> None:
        sinfo("main*", "urgent")
        check_partition("urgent")
        check_partition("urgent,main")
        check_partition(None)
        with pytest.raises(ValueError, match=r"no partition 'urgnt' .did you mean 'urgent'"):
            check_partition("urgnt")

    def test_none_without_a_default(self, sinfo: Any) -> None:
        sinfo("gpu", "cpu")
        with pytest.raises(ValueError, match=r"--slurm-partition is missing.*gpu, cpu"):
            check_partition(None)


class TestLocalWorkers:
    @pytest.fixture
    def _two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distutils, "get_world_size", lambda: 2)

    @pytest.mark.parametrize("wrong", [-1, 1.5, True, "2"])
    def test_numbers_that_are_none(self, make_trainer: Any, run_settings: Any, wrong: Any) -> None:
        run_settings["optim"]["local_num_workers"] = wrong
        with pytest.raises(ValueError, match=r"'optim.local_num_workers' must be a whole number"):
            make_trainer(run_settings)

    @pytest.mark.usefixtures("_two_ranks")
    def test_only_where_fairchem_starts_the_ranks(self, lmdb_folders: dict[str, Path]) -> None:
        data = LazyLmdbDataset({"src": str(lmdb_folders["val"])})
        settings = {"num_workers": 0, "local_num_workers": 3}
        assert workers.of_local_rank(settings, {}, data) == 3
        assert workers.of_local_rank(settings, {}, Subset(data, [0, 1])) == 3
        assert workers.of_local_rank({"num_workers": 0}, {}, data) is None
        assert workers.of_local_rank(settings, {"folder": "logs/%j"}, data) is None

    def test_not_on_one_rank(self, lmdb_folders: dict[str, Path]) -> None:
        data = LazyLmdbDataset({"src": str(lmdb_folders["val"])})
        assert workers.of_local_rank({"local_num_workers": 3}, {}, data) is None

    @pytest.mark.usefixtures("_two_ranks")
    def test_other_readers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'optim.local_num_workers' is 3, but TensorDataset"):
            workers.of_local_rank({"local_num_workers": 3}, {}, TensorDataset())
        assert workers.of_local_rank({"local_num_workers": 0}, {}, TensorDataset()) == 0


@pytest.mark.parametrize("model", ["EquiformerV2DeNS", "ESCNDeNS", "EquiformerDeNS"])
def test_graph_parallelism_is_refused(make_trainer: Any, run_settings: Any, model: str) -> None:
    run_settings["model"]["name"] = f"fairchem_dens.models.{model}"
    with pytest.raises(ValueError, match=r"--gp-gpus 2: graph parallelism is not supported"):
        make_trainer(run_settings, gp_gpus=2)
