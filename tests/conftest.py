"""What all tests share."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

# Before torch is imported. The tests' tensors are small: more threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import yaml

# Before anything imports triton: where there is no GPU, its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from torch_geometric.data import Data

# The same examples in every run, so that a failure is one for everybody; no deadline, because the first
# example pays for imports.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same state of torch's generator and leaves the caller's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def installed() -> None:
    """Skips where the package is imported from a checkout instead of being installed."""
    try:
        distribution("fairchem_dens")
    except PackageNotFoundError:
        pytest.skip("fairchem_dens is not installed in this environment: run the tests with `make test`")


@pytest.fixture
def python(tmp_path) -> Callable[..., str]:
    """Runs code in a fresh interpreter, in an empty folder; returns what it printed."""

    def run(code: str, *options: str, path: str | None = None) -> str:
        # Not the pytest process's own PYTHONPATH first: a folder given here shadows what is installed.
        environment = dict(os.environ)
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@contextlib.contextmanager
def _only_run_with_ranks() -> Iterator[None]:
    """Wait for other tests: fairchem's local runs on several ranks all meet at one port."""
    with (Path(tempfile.gettempdir()) / "fairchem_dens_tests_with_ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Fairchem:
    """The `fairchem` command in a folder of its own, where YAMLs, checkpoints, results and logs lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(
        self, mode: str, settings: dict[str, Any] | Path, *options: str, name: str = "run"
    ) -> subprocess.Popen[str]:
        """Start it on a YAML, or on the dictionary of one, under a name that a later call resumes."""
        yml = settings
        if not isinstance(yml, Path):
            yml = self.folder / f"{name}.yml"
            yml.write_text(yaml.safe_dump(settings))
        beside = shutil.which("fairchem", path=str(Path(sys.executable).parent))
        return subprocess.Popen(
            [
                *([beside] if beside else [sys.executable, "-m", "fairchem.core._cli"]),
                *("--mode", mode, "--config-yml", str(yml), "--cpu", "--run-dir", str(self.folder)),
                *("--timestamp-id", name, "--print-every", "1", *options),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder,
            env=os.environ | {"WANDB_MODE": "disabled"},
        )  # fmt: skip

    def __call__(self, mode: str, settings: dict[str, Any] | Path, *options: str, name: str = "run") -> str:
        """Run it to its end; returns what it said."""
        with _only_run_with_ranks() if "--num-gpus" in options else contextlib.nullcontext():
            process = self.start(mode, settings, *options, name=name)
            try:
                output, _ = process.communicate(timeout=900)
            finally:
                process.kill()
        assert process.returncode == 0, output[-6000:]
        return output

    def file(self, name: str = "run", file: str = "checkpoint.pt") -> Path:
        """Path of a checkpoint."""
        return self.folder / "checkpoints" / name / file

    def checkpoint(self, name: str = "run", file: str = "checkpoint.pt") -> dict[str, Any]:
        """A checkpoint, loaded as torch 2.6 and later do by default: a file of ours needs nothing more."""
        return torch.load(self.file(name, file), map_location="cpu", weights_only=True)

    def results(self, name: str = "run", file: str = "s2ef_predictions.npz") -> dict[str, np.ndarray]:
        """The arrays of a file of results."""
        with np.load(self.folder / "results" / name / file) as arrays:
            return dict(arrays)


@pytest.fixture
def fairchem(tmp_path: Path) -> Fairchem:
    """Runs the `fairchem` command in the test's folder."""
    return Fairchem(tmp_path)


def random_structure(
    seed: int,
    *,
    natoms: int = 12,
    num_fixed: int = 4,
    dtype: torch.dtype = torch.float32,
    periodic: bool = True,
) -> Data:
    """A jittered slab of Cu and Pd with an O or H on top: sensible distances, forces of any size."""
    rng = np.random.default_rng(seed)
    cell = np.diag([5.1, 5.1, 18.0]) + rng.uniform(-0.2, 0.2, (3, 3)) * (1 - np.eye(3))
    places = np.array([[x, y, z] for z in range(8) for y in range(2) for x in range(2)], dtype=float)[:natoms]
    pos = (places * [0.5, 0.5, 0.11] + 0.05 + 0.25 * (places[:, 2:] % 2) * [1, 1, 0]) @ cell
    pos += rng.normal(scale=0.12, size=pos.shape)
    numbers = np.where(rng.random(natoms) < 0.5, 29, 46)
    numbers[-1] = rng.choice([1, 8])
    fixed = np.zeros(natoms, dtype=np.int64)
    fixed[:num_fixed] = 1
    forces = rng.normal(scale=0.7, size=(natoms, 3))
    return Data(
        pos=torch.tensor(pos, dtype=dtype),
        cell=torch.tensor(cell, dtype=dtype)[None],
        pbc=torch.full((1, 3), periodic),
        atomic_numbers=torch.tensor(numbers),
        natoms=natoms,
        fixed=torch.tensor(fixed),
        tags=torch.tensor(np.where(fixed == 1, 0, 1)),
        forces=torch.tensor(forces, dtype=dtype),
        energy=float(rng.normal()),
        sid=seed,
        fid=0,
    )


@pytest.fixture(name="structure", scope="session")
def structure_fixture() -> Callable[..., Data]:
    """Makes a structure from a seed, see `random_structure`."""
    return random_structure


def write_structures(
    folder: Path, structures: Iterable[Data], *, with_metadata: bool = True, labels: bool = True
) -> Path:
    """Write structures as one LMDB folder of fairchem's."""
    from fairchem_dens.data.lmdb import LmdbWriter

    with LmdbWriter(folder, labels=labels) as writer:
        for data in structures:
            writer.add(data)
    if not with_metadata:
        (folder / "metadata.npz").unlink()
    return folder


@pytest.fixture(scope="session")
def write_lmdb() -> Callable[..., Path]:
    """Writes structures as one LMDB folder of fairchem's."""
    return write_structures


def small_data(root: Path, train: int = 24) -> dict[str, Path]:
    """Write train, val and test (6 structures each) of 10 to 14 atoms."""
    sizes = {"train": range(train), "val": range(100, 106), "test": range(200, 206)}
    return {
        split: write_structures(root / split, [random_structure(s, natoms=10 + s % 5) for s in seeds])
        for split, seeds in sizes.items()
    }


@pytest.fixture(scope="session")
def lmdb_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train (24 structures), val and test (6 each), of 10 to 14 atoms."""
    return small_data(tmp_path_factory.mktemp("lmdb"))


@pytest.fixture(scope="session", name="model_settings")
def model_settings_fixture() -> dict[str, Any]:
    """A very small EquiformerV2, without the name."""
    return small_model()


def small_model() -> dict[str, Any]:
    """A very small EquiformerV2, without the name."""
    return {
        "use_pbc": True,
        "regress_forces": True,
        "otf_graph": True,
        "max_neighbors": 12,
        "max_radius": 6.0,
        "max_num_elements": 90,
        "num_layers": 1,
        "sphere_channels": 8,
        "attn_hidden_channels": 8,
        "num_heads": 2,
        "attn_alpha_channels": 4,
        "attn_value_channels": 4,
        "ffn_hidden_channels": 8,
        "norm_type": "layer_norm_sh",
        "lmax_list": [2],
        "mmax_list": [2],
        "grid_resolution": 8,
        "edge_channels": 8,
        "attn_activation": "silu",
        "ffn_activation": "silu",
        "use_grid_mlp": True,
        "alpha_drop": 0.1,
        "drop_path_rate": 0.05,
        "weight_init": "uniform",
    }


def small_run(lmdb_folders: dict[str, Path], model_settings: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a small run with DeNS, as a dictionary."""
    return {
        "trainer": "fairchem_dens.trainer.DeNSTrainer",
        "logger": "tensorboard",
        "dataset": {
            "train": {
                "format": "lmdb",
                "src": str(lmdb_folders["train"]),
                "transforms": {
                    "normalizer": {
                        "energy": {"mean": 0.1, "rmsd": 1.2},
                        "forces": {"mean": 0.0, "rmsd": 0.7},
                    },
                    "dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5},
                },
            },
            "val": {"src": str(lmdb_folders["val"])},
            "test": {"src": str(lmdb_folders["test"])},
        },
        "task": {},
        "outputs": {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
            {"noise": {"fn": "l2mae", "coefficient": 10}},
        ],
        "evaluation_metrics": {
            "primary_metric": "forces_mae",
            "metrics": {"energy": ["mae"], "forces": ["mae", "cosine_similarity"]},
        },
        "model": {"name": "fairchem_dens.models.EquiformerV2DeNS", **copy.deepcopy(model_settings)},
        "optim": {
            "batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "lr_initial": 0.002,
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": 0.001},
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_factor": 0.2,
                "warmup_epochs": 0.01,
                "lr_min_factor": 0.01,
            },
            "max_epochs": 2,
            "clip_grad_norm": 100,
            "ema_decay": 0.9,
            "eval_every": 1000,
        },
    }


@pytest.fixture
def run_settings(lmdb_folders: dict[str, Path], model_settings: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a small run with DeNS, as a dictionary that a test may change."""
    return small_run(lmdb_folders, model_settings)


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, lmdb_folders: dict[str, Path], model_settings: dict[str, Any]
) -> Path:
    """The checkpoint that a run as that of `run_settings` leaves, with weights far from their average."""
    run, settings = Fairchem(tmp_path_factory.mktemp("trained")), small_run(lmdb_folders, model_settings)
    settings["optim"] |= {"lr_initial": 0.02, "max_epochs": 5}
    run("train", settings)
    return run.file()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Builds a trainer from the dictionary of a YAML, the way fairchem's command line does."""

    def make(settings: dict[str, Any], *, trainer: Any = None, **arguments: Any) -> Any:
        from fairchem.core.common.registry import registry
        from fairchem.core.common.utils import setup_imports

        setup_imports()
        trainer_class = trainer or registry.get_trainer_class(settings["trainer"])
        settings = copy.deepcopy(settings)
        given = {
            "task": settings.get("task", {}),
            "model": settings["model"],
            "outputs": settings["outputs"],
            "dataset": settings["dataset"],
            "optimizer": settings["optim"],
            "loss_functions": settings["loss_functions"],
            "evaluation_metrics": settings["evaluation_metrics"],
            "identifier": "test",
            "timestamp_id": "test",
            "run_dir": str(tmp_path),
            "local_rank": 0,
            "logger": settings["logger"],
            "print_every": 1000,
            "seed": 0,
            "cpu": True,
            "name": "ocp",
        }
        return trainer_class(**(given | arguments))

    return make


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Loads a file of outputs of the authors' own code; skips where those files are not at hand.

    They are looked for in the folder that FAIRCHEM_DENS_GOLDEN names, else in ``shared/golden`` beside the
    checkout.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
    folder = Path(os.environ.get("FAIRCHEM_DENS_GOLDEN", beside))

    def load(name: str) -> Any:
        if not (folder / name).is_file():
            pytest.skip(
                f"needs {name}, outputs of the authors' code (set FAIRCHEM_DENS_GOLDEN to their folder)"
            )
        # Dictionaries of tensors and numbers that are not more than that, but pickled with numpy scalars.
        return torch.load(folder / name, weights_only=False)

    return load


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Finds a file or folder of the small real data sets; skips where they are not at hand.

    They are looked for in the folder that FAIRCHEM_DENS_REAL_DATA names, else in ``shared/data`` beside the
    checkout.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("FAIRCHEM_DENS_REAL_DATA", beside))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"needs the real data {name} (set FAIRCHEM_DENS_REAL_DATA to the folder that has it)")
        return folder / name

    return find
