"""What the demo is going to do: its size, its folder, its configurations and the commands it will run."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fairchem_dens.cli.configs import copy_configs
from fairchem_dens.data.emt import EmtSettings
from fairchem_dens.data.folder import write_text

RUNS = ("baseline", "dens")
MODES = ("train", "validate", "predict")
TITLES = {"baseline": "without DeNS", "dens": "with DeNS"}
PRINT_EVERY = 10
"""Steps between two lines of fairchem's log, and over which it averages the metrics of training."""

_BATCH_SIZE = 8  # as in configs/demo/base.yml
_MOST_EVALUATIONS = 25
_STEPS_BETWEEN_CHECKPOINTS = 50


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to compute.

    Attributes:
        train_systems, val_systems, test_systems, frames_per_system: size of the generated set.
        epochs: epochs of either run.
        says: what to expect, in a few words.
    """

    train_systems: int
    val_systems: int
    test_systems: int
    frames_per_system: int
    epochs: int
    says: str


BUDGETS = {
    "ci": Budget(
        train_systems=20,
        val_systems=8,
        test_systems=8,
        frames_per_system=4,
        epochs=10,
        says="under 2.5 minutes on two cores; shows that all works, far too short to compare methods",
    ),
    "default": Budget(
        train_systems=60,
        val_systems=30,
        test_systems=30,
        frames_per_system=4,
        epochs=28,
        says="under 10 minutes on two cores; little data, so that DeNS pays within that time",
    ),
    "long": Budget(
        train_systems=120,
        val_systems=60,
        test_systems=60,
        frames_per_system=4,
        epochs=100,
        says="an hour or so on two cores; more data and many more epochs",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what the demo computes. The same settings on the same machine give the same numbers.

    Attributes:
        budget: name of the budget that the other values started from.
        seed: seed of the data, of the initial weights, of the order of batches and of the noise.
        epochs: epochs of either run.
        data: the generated set.
        cpu: whether to leave a GPU alone.
    """

    budget: str
    seed: int
    epochs: int
    data: EmtSettings
    cpu: bool

    @classmethod
    def make(
        cls,
        *,
        budget: str = "default",
        seed: int = 1,
        epochs: int | None = None,
        train_frames: int | None = None,
        cpu: bool = True,
    ) -> Settings:
        """Start from a budget and change some of it.

        Args:
            budget: a key of `BUDGETS`.
            seed: see above.
            epochs: instead of the budget's.
            train_frames: instead of the budget's; rounded up to whole systems.
            cpu: see above.

        Raises:
            ValueError: an unknown budget, or a number below 1.
        """
        if budget not in BUDGETS:
            raise ValueError(f"There is no budget '{budget}': choose one of {', '.join(BUDGETS)}.")
        for option, value in (("--epochs", epochs), ("--train-frames", train_frames)):
            if value is not None and value < 1:
                raise ValueError(f"'{option}' must be at least 1, found {value}.")
        chosen = BUDGETS[budget]
        train_systems = chosen.train_systems
        if train_frames is not None:
            train_systems = math.ceil(train_frames / chosen.frames_per_system)
        data = EmtSettings(
            train_systems=train_systems,
            val_systems=chosen.val_systems,
            test_systems=chosen.test_systems,
            frames_per_system=chosen.frames_per_system,
            seed=seed,
        )
        return cls(
            budget=budget,
            seed=seed,
            epochs=chosen.epochs if epochs is None else epochs,
            data=data,
            cpu=cpu,
        )


class Folder:
    """Where the demo keeps what. All paths are below ``root``."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.data = self.root / "data"
        self.configs = self.root / "configs"
        self.logs = self.root / "logs"
        self.predictions = self.root / "predictions"
        self.commands = self.root / "commands.txt"
        self.results = self.root / "results.json"
        self.report = self.root / "report.md"
        self.curves = self.root / "curves.png"
        self.picture = self.root / "structure.png"
        self._state = self.root / ".state"
        self.lock = self._state / "lock"

    def make(self) -> None:
        """Make the folders that everything else expects."""
        for folder in (self.root, self.configs, self.logs, self.predictions, self._state):
            folder.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, run: str) -> Path:
        """The checkpoint that a run resumes from and ends with."""
        return self.root / "checkpoints" / run / "checkpoint.pt"

    def events(self, identifier: str) -> Path:
        """TensorBoard's files of one fairchem command."""
        return self.root / "logs" / "tensorboard" / identifier

    def read_state(self, name: str) -> Any:
        """Return what `write_state` recorded under ``name``, or None."""
        file = self._state / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_state(self, name: str, content: Any) -> None:
        """Record ``content`` so that a later start finds all of it or nothing."""
        write_text(self._state / f"{name}.json", json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Stage:
    """One fairchem command.

    Attributes:
        run: ``baseline`` or ``dens``.
        mode: fairchem's ``--mode``.
        arguments: what follows ``fairchem``, relative to the demo's folder.
    """

    run: str
    mode: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name under which its end is recorded and its log is kept."""
        return f"{self.run}-{self.mode}"

    @property
    def command(self) -> str:
        """The command as one would type it in the demo's folder."""
        return shlex.join(("fairchem", *self.arguments))


def stages(settings: Settings) -> Iterator[tuple[Stage, ...]]:
    """Yield groups of commands: independent of each other within a group, which needs the one before it."""
    for mode in MODES:
        yield tuple(_stage(run, mode, settings) for run in RUNS)


def _stage(run: str, mode: str, settings: Settings) -> Stage:
    # A fixed --timestamp-id is how fairchem finds the checkpoint of a run that was cut off, and resumes it.
    identifier = run if mode == "train" else f"{run}-{mode}"
    arguments = ["--mode", mode, "--config-yml", f"configs/{run}.yml", "--run-dir", "."]
    arguments += ["--identifier", identifier, "--timestamp-id", identifier, "--seed", str(settings.seed)]
    if mode == "train":
        arguments += ["--print-every", str(PRINT_EVERY)]
    else:
        arguments += ["--checkpoint", f"checkpoints/{run}/checkpoint.pt"]
    if settings.cpu:
        arguments.append("--cpu")
    return Stage(run, mode, tuple(arguments))


def steps_per_epoch(train_frames: int) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(train_frames / _BATCH_SIZE)


def write_configs(folder: Folder, settings: Settings, summary: dict[str, Any]) -> None:
    """Write the YAMLs: the shipped ones, and two that include them and add what depends on the data.

    Args:
        folder: where to; they end in ``configs/``.
        settings: the demo's.
        summary: what `fairchem_dens.data.emt.generate` returned.
    """
    copy_configs(["demo"], folder.configs, force=True)
    train = summary["splits"]["train"]
    per_epoch = steps_per_epoch(train["frames"])
    normalizer = {
        "energy": {"mean": _rounded(train["energy_mean"]), "rmsd": _rounded(train["energy_std"])},
        "forces": {"mean": 0.0, "rmsd": _rounded(train["force_rms"])},
    }
    added = {
        "dataset": {
            "train": {"src": "data/train", "transforms": {"normalizer": normalizer}},
            "val": {"src": "data/val"},
            "test": {"src": "data/test"},
        },
        "optim": {
            "max_epochs": settings.epochs,
            "eval_every": per_epoch * math.ceil(settings.epochs / _MOST_EVALUATIONS),
            "checkpoint_every": _STEPS_BETWEEN_CHECKPOINTS,
        },
    }
    for run in RUNS:
        text = yaml.safe_dump({"includes": [f"demo/{run}.yml"], **added}, sort_keys=False)
        head = f"# The run {TITLES[run]} of `fairchem-dens demo`, which wrote this, on the data in data/.\n"
        write_text(folder.configs / f"{run}.yml", head + text)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def write_commands(folder: Folder, settings: Settings, environment: Mapping[str, str]) -> None:
    """Write the exact commands of the demo, to be pasted into a shell."""
    lines = [
        "# The fairchem commands of this demo. The data set in data/ was generated before them.",
        "# A training that is started again resumes: --timestamp-id names the folder with its checkpoint.",
        f"cd {shlex.quote(str(folder.root))}",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        "export " + " ".join(f"{name}={value}" for name, value in environment.items()),
    ]
    for group in stages(settings):
        lines += ["", *(stage.command for stage in group)]
    write_text(folder.commands, "\n".join(lines) + "\n")


def fairchem_executable() -> list[str]:
    """How to call the ``fairchem`` of this Python: its console script, or the module behind it."""
    script = Path(sys.executable).with_name("fairchem")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "fairchem.core._cli"]


def refuse_foreign(folder: Folder) -> None:
    """Leave a folder alone that holds something else than a demo.

    Raises:
        ValueError: it does.
    """
    occupied = folder.root.exists() and (not folder.root.is_dir() or any(folder.root.iterdir()))
    if occupied and not folder.lock.parent.is_dir():
        raise ValueError(
            f"'{folder.root}' exists and is not the folder of a demo: choose another with --out."
        )


def claim(folder: Folder, settings: Settings) -> None:
    """Bind a folder to these settings, so that what is in it is resumed and never mixed with something else.

    Raises:
        ValueError: it holds a demo with other settings.
    """
    wanted = asdict(settings)
    found = folder.read_state("settings")
    if found is None:
        folder.make()
        folder.write_state("settings", wanted)
    elif found != wanted:
        names = [name for name, value in wanted.items() if found.get(name) != value]
        raise ValueError(
            f"'{folder.root}' holds a demo with other settings (different: {', '.join(names)}). Give the "
            "options it was started with to resume it, remove the folder, or choose another with --out."
        )
    folder.make()
