"""Trains for a few steps on 1, 2 and 4 ranks, on batches that are given, and writes what came out.

    python steps_on_ranks.py JOB FOLDER

JOB is a file of `torch.save`: a dictionary of runs, each with ``settings`` (of a YAML), ``worlds`` (numbers
of ranks), ``steps`` and ``evaluation``. A step is a list with the structures of each of four ranks; on two
ranks the first gets those of the first two, and so on. Each rank leaves RUN.WORLD.RANK.pt in FOLDER.

Ranks are forked from a process that has imported everything, which on the few cores of a test machine is most
of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from fairchem.core.common import distutils
from fairchem.core.common.logger import Logger
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

from fairchem_dens.data.collate import collate
from fairchem_dens.models import graph
from precision import default_precision

MOST_RANKS = 4


class Recorded(Logger):
    """A logger that keeps what it is given."""

    said: ClassVar[list[dict[str, Any]]] = []

    def watch(self, *_: Any, **__: Any) -> None: ...

    def log(self, update_dict: dict[str, Any], step: int, split: str = "") -> None:
        self.said.append(
            {"step": step, "split": split} | {name: float(value) for name, value in update_dict.items()}
        )

    def log_plots(self, *_: Any, **__: Any) -> None: ...

    def mark_preempting(self) -> None: ...

    def log_summary(self, *_: Any) -> None: ...

    def log_artifact(self, *_: Any, **__: Any) -> None: ...


def batches(steps: list[list[list[Any]]], world: int, rank: int) -> list[Any]:
    """This rank's batch of each step."""
    share = range(rank * MOST_RANKS // world, (rank + 1) * MOST_RANKS // world)
    return [collate([data for part in share for data in step[part]], otf_graph=True) for step in steps]


def train(name: str, run: dict[str, Any], world: int, rank: int, folder: Path) -> None:
    """One run on one rank."""
    torch.manual_seed(0)
    settings = dict(run["settings"])
    Recorded.said.clear()
    trainer = registry.get_trainer_class(settings.pop("trainer"))(
        optimizer=settings.pop("optim"), identifier=name, timestamp_id=f"{name}.{world}", run_dir=str(folder),
        local_rank=rank, seed=0, cpu=True, print_every=1, **settings | {"logger": "recorded"},
    )  # fmt: skip
    if "weights" in run:
        trainer._unwrapped_model.load_state_dict(run["weights"])
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            {key: p.grad.clone() for key, p in trainer._unwrapped_model.named_parameters() if p.requires_grad}
        )
    )
    trainer.train_loader = batches(run["steps"], world, rank)
    trainer.train(disable_eval_tqdm=True)
    evaluated = {}
    if run["evaluation"]:
        trainer.val_loader = batches(run["evaluation"], world, rank)
        evaluated = {key: value["metric"] for key, value in trainer.validate(disable_tqdm=True).items()}
    torch.save(
        {"logged": Recorded.said, "gradients": gradients, "evaluated": evaluated},
        folder / f"{name}.{world}.{rank}.pt",
    )


def be_a_rank(runs: dict[str, Any], world: int, rank: int, port: int, folder: Path) -> None:
    """All runs that are to have so many ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:
        distutils.setup(
            {"submit": False, "summit": False, "world_size": world, "distributed_backend": "gloo"}
        )
    for name, run in runs.items():
        # In double precision: what sums in another order cost is then far below any real difference.
        graph.radius_graph_pbc = default_precision(torch.float32)(search)
        with default_precision(torch.float64):
            train(name, run, world, rank, folder)
        graph.radius_graph_pbc = search
    distutils.cleanup()


search = graph.radius_graph_pbc

if __name__ == "__main__":
    job, place = sys.argv[1:]
    setup_imports()
    registry.register_logger("recorded")(Recorded)
    todo = torch.load(job, weights_only=False)
    for size in (1, 2, 4):
        chosen = {name: run for name, run in todo.items() if size in run["worlds"]}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=be_a_rank, args=(chosen, size, rank, number, Path(place)))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=240)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            process.kill()
        if failed:
            sys.exit(f"{size} ranks: {failed} failed")
