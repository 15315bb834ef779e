"""What installing the wheel alone gives: commands that start, and names that fairchem finds in every process.

Everything runs in fresh interpreters of the environment, in an empty folder, without importing this package
first.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fairchem_dens

pytestmark = pytest.mark.usefixtures("installed")

PROBE = '''
"""What fairchem finds, asked as fairchem asks."""
import sys


def found():
    assert "fairchem_dens.register" not in sys.modules
    from fairchem.core.common.registry import registry
    from fairchem.core.common.utils import setup_imports

    setup_imports()
    by_dotted_path = [
        registry.get_trainer_class("fairchem_dens.trainer.DeNSTrainer"),
        registry.get_model_class("fairchem_dens.models.EquiformerV2DeNS"),
        registry.get_dataset_class("fairchem_dens.data.dens_lmdb.DeNSLmdbDataset"),
    ]
    by_short_name = [
        registry.get_trainer_class("dens"),
        registry.get_model_class("equiformer_v2_dens"),
        registry.get_dataset_class("dens_lmdb"),
    ]
    assert by_short_name == by_dotted_path, (by_short_name, by_dotted_path)
    assert registry.get_trainer_class("denoising_forces") is by_dotted_path[0]

    from fairchem.core.modules.transforms import DataTransforms

    structure = object()
    for name in ("dens", "fairchem_dens.transforms.dens"):
        assert DataTransforms({name: {"prob": 0.5}})(structure) is structure
    return "all found"


if __name__ == "__main__":
    import os
    from pathlib import Path

    Path(f"found_{os.environ.get('RANK', '0')}").write_text(found())
'''

SPAWNED_WORKER = """
import torch
from torch_geometric.data import Data
from fairchem.core.modules.transforms import DataTransforms
from fairchem_dens.corruption import Corruption
from fairchem_dens.transforms import ArmedCorruption


class Structures(torch.utils.data.Dataset):
    def __init__(self, name):
        self.transforms = DataTransforms({name: ArmedCorruption(Corruption(prob=1.0, std=0.1), 0, int)})

    def __len__(self):
        return 1

    def __getitem__(self, index):
        from fairchem.core.common.registry import registry

        assert not registry.get("imports_setup", no_warning=True)
        assert torch.utils.data.get_worker_info() is not None
        data = Data(
            pos=torch.zeros(4, 3), forces=torch.ones(4, 3), atomic_numbers=torch.ones(4), natoms=4,
            fixed=torch.zeros(4), tags=torch.zeros(4), cell=torch.eye(3)[None], energy=0.0,
        )
        return self.transforms(data)


if __name__ == "__main__":
    for name in ("dens", "fairchem_dens.transforms.dens"):
        loader = torch.utils.data.DataLoader(
            Structures(name), batch_size=None, num_workers=1, multiprocessing_context="spawn"
        )
        for data in loader:
            assert bool(data.corrupted), data
            assert data.pos.abs().sum() > 0
    print("corrupted")
"""

ELASTIC = """
import probe
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    print(sorted(elastic_launch(config, probe.found)().items()))
"""

SUBMITIT = """
import probe
import submitit

if __name__ == "__main__":
    executor = submitit.AutoExecutor(folder="jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    print(executor.submit(probe.found).result())
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


@pytest.fixture
def probe(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def test_the_installed_package_is_the_one_under_test():
    site_packages = Path(sysconfig.get_path("purelib"))
    assert Path(fairchem_dens.__file__).is_relative_to(site_packages)
    assert distribution("fairchem_dens").version == fairchem_dens.__version__


def test_wheel_has_what_makes_it_found():
    files = {str(path) for path in distribution("fairchem_dens").files or []}
    for name in ("fairchem_dens.pth", "fairchem/experimental/.include", "fairchem_dens/py.typed"):
        assert name in files
    # fairchem is a namespace package: an __init__.py of ours would hide fairchem.core.
    assert not {"fairchem/__init__.py", "fairchem/experimental/__init__.py"} & files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert any(name.startswith("fairchem_dens/configs/oc20/") for name in files)


def test_start_up_line_is_in_effect_and_light(tmp_path):
    code = """if True:
        import sys
        from fairchem_dens.compat import StandInFinder
        print(sys.meta_path.count(StandInFinder), sys.meta_path[-1] is StandInFinder, 'torch' in sys.modules)
    """
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["1", "True", "False"]


def test_fairchem_command_starts(tmp_path):
    assert "--config-yml" in run(script("fairchem"), "--help", cwd=tmp_path)


def test_every_module_of_fairchem_that_it_runs_can_be_imported(tmp_path):
    code = """if True:
        import importlib, pkgutil
        import fairchem.core
        # Hyperparameter search needs ray, an optional dependency of fairchem-core's own.
        for module in pkgutil.walk_packages(fairchem.core.__path__, "fairchem.core."):
            if "hpo" not in module.name:
                importlib.import_module(module.name)
    """
    run(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path)


def test_names_are_found_after_setup_imports(probe):
    run(sys.executable, probe.name, cwd=probe.parent)
    assert (probe.parent / "found_0").read_text() == "all found"


def test_a_spawned_loader_worker_finds_the_transform(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWNED_WORKER)
    assert run(sys.executable, "spawn.py", cwd=tmp_path).split() == ["corrupted"]


@pytest.mark.slow
def test_torchrun_children_find_the_names(probe):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(sys.executable, *launcher, probe.name, cwd=probe.parent)
    assert [(probe.parent / f"found_{rank}").read_text() for rank in (0, 1)] == ["all found"] * 2


@pytest.mark.slow
def test_elastic_children_find_the_names(probe):
    # How fairchem starts several processes on one machine (--num-gpus).
    (probe.parent / "elastic.py").write_text(ELASTIC)
    out = run(sys.executable, "elastic.py", cwd=probe.parent)
    assert out.strip() == "[(0, 'all found'), (1, 'all found')]"


@pytest.mark.slow
def test_a_submitted_job_finds_the_names(probe):
    (probe.parent / "submit.py").write_text(SUBMITIT)
    assert run(sys.executable, "submit.py", cwd=probe.parent).strip() == "all found"


def test_configs_are_listed_and_copied_with_what_they_include(tmp_path):
    listed = [
        line.split()[0] for line in run(script("fairchem-dens"), "configs", "list", cwd=tmp_path).splitlines()
    ]
    assert "oc20/equiformer_v2_dens_2M_12ep.yml" in listed
    assert not any(name.startswith("includes/") for name in listed)

    copied = run(
        script("fairchem-dens"), "configs", "copy", "oc20/equiformer_v2_dens_2M_12ep", "mine", cwd=tmp_path
    )
    copies = [tmp_path / line for line in copied.splitlines()]
    assert tmp_path / "mine/oc20/equiformer_v2_dens_2M_12ep.yml" in copies
    assert all(path.is_file() for path in copies)

    code = """if True:
        from fairchem.core.common.utils import load_config
        config, warnings, errors = load_config("mine/oc20/equiformer_v2_dens_2M_12ep.yml")
        assert not errors, errors
        print(config["trainer"])
    """
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["fairchem_dens.trainer.DeNSTrainer"]

    run(script("fairchem-dens"), "configs", "copy", "everything", cwd=tmp_path)
    assert {
        path.relative_to(tmp_path / "everything").as_posix()
        for path in (tmp_path / "everything").rglob("*.yml")
    } >= set(listed)


def test_errors_of_the_command_are_one_line(tmp_path):
    def fails(*arguments: str) -> str:
        done = subprocess.run(
            [script("fairchem-dens"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        return done.stderr

    error = fails("configs", "copy", "oc20s", "mine")
    assert error.count("\n") == 1 and "'oc20s'" in error and "'oc20'" in error
    assert not (tmp_path / "mine").exists()

    run(script("fairchem-dens"), "configs", "copy", "oc20", "mine", cwd=tmp_path)
    run(script("fairchem-dens"), "configs", "copy", "oc20", "mine", cwd=tmp_path)  # nothing differs
    changed = tmp_path / "mine/oc20/equiformer_v2_dens_2M_12ep.yml"
    changed.write_text("optim: {}\n")
    error = fails("configs", "copy", "oc20", "mine")
    assert str(changed.relative_to(tmp_path)) in error and "--force" in error
    assert changed.read_text() == "optim: {}\n"
    run(script("fairchem-dens"), "configs", "copy", "--force", "oc20", "mine", cwd=tmp_path)
    assert changed.read_text() != "optim: {}\n"

    assert "COMMAND" in fails()


def test_command_has_version_and_help(tmp_path):
    assert run(script("fairchem-dens"), "--version", cwd=tmp_path).split() == [
        "fairchem_dens",
        fairchem_dens.__version__,
    ]
    overview = run(script("fairchem-dens"), "--help", cwd=tmp_path)
    assert "configs" in overview and "demo" in overview
    assert "FOLDER" in run(script("fairchem-dens"), "configs", "copy", "--help", cwd=tmp_path)
