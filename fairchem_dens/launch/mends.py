"""What is mended in fairchem-core 1.10.0's own launcher, for jobs that fail or lose work without it.

1. ``--submit --cpu`` ends in nccl and `torch.cuda.set_device`, which a CPU job has not. Such a job is set up
   like one of torchrun's ranks instead: from the environment, which submitit's own helper fills from SLURM's.
2. A preemption before training has begun ends a job (nothing to save yet), or writes fresh weights over the
   checkpoint that is just being loaded. Such a job starts again from what it was given.
3. ``--sweep-yml`` needs `collections.MutableMapping`, which Python has not had since 3.10.

Jobs on GPUs take fairchem's own path in all of this; what is mended is what fails otherwise.
"""

from __future__ import annotations

import collections
import collections.abc
import functools
import logging
import os
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairchem.core.common import distutils, utils

# submitit and fairchem's command line are imported where they are needed: this module is imported wherever
# fairchem is.

Setup = Callable[[dict[str, Any]], None]

_NOT_LENT = (20000, 32768)
"""Ports below those that Linux lends to outgoing connections."""


def mend() -> None:
    """Put the mends in place, once."""
    if not hasattr(distutils.setup, "__wrapped__"):
        distutils.setup = _with_mends_of_jobs(distutils.setup)
    if not hasattr(utils.collections, "MutableMapping"):
        names = {**vars(collections), "MutableMapping": collections.abc.MutableMapping}
        utils.collections = types.SimpleNamespace(**names)


def _with_mends_of_jobs(setup: Setup) -> Setup:
    """Wrap fairchem's set-up of a process, the first thing that a submitted job calls."""

    @functools.wraps(setup)
    def mended(config: dict[str, Any]) -> None:
        if not config["submit"]:
            setup(config)
            return
        _keep_checkpoints_of_loading_jobs()
        if config.get("cpu") and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _set_up_from_environment(setup, config)
        else:
            setup(config)

    return mended


def _set_up_from_environment(setup: Setup, config: dict[str, Any]) -> None:
    """Set up one rank of a CPU job as fairchem sets up the ranks that it starts itself."""
    from submitit.helpers import TorchDistributedEnvironment

    # A requeued job inherits nothing from its first life, but sbatch hands on the shell that submitted it.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if rank.world_size != config["world_size"]:
        raise ValueError(
            f"The job has {rank.world_size} tasks, but the run was submitted for {config['world_size']} "
            "ranks (--num-nodes times --num-gpus): remove 'ntasks' and its like from 'slurm' in the YAML."
        )
    os.environ["MASTER_PORT"] = str(_meeting_port(rank.world_size))
    logging.info(f"CPU job: rank {rank.rank} of {rank.world_size}, {config['distributed_backend']}.")
    config["submit"] = False
    try:
        setup(config)
    finally:
        config["submit"] = True


def _meeting_port(world_size: int) -> int:
    """Return the port where the ranks of this job meet, the same on all of them.

    submitit's choice often lies among those that Linux lends to outgoing connections, from 32768 on, so that
    any program of the node may have it.
    """
    if world_size == 1:
        return int(distutils.get_free_port())
    return random.Random(os.environ["SLURM_JOB_ID"]).randrange(*_NOT_LENT)


def _keep_checkpoints_of_loading_jobs() -> None:
    """Wrap the method of fairchem's runner that submitit calls when a job is preempted or its time is up."""
    from fairchem.core._cli import Runner

    if not hasattr(Runner.checkpoint, "__wrapped__"):
        Runner.checkpoint = _starting_again_if_nothing_was_trained(Runner.checkpoint)


def _starting_again_if_nothing_was_trained(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    from submitit.helpers import DelayedSubmission

    @functools.wraps(checkpoint)
    def mended(runner: Any, config: dict[str, Any]) -> Any:
        """Return what the next life of the job is to run.

        Args:
            runner: fairchem's runner, in the middle of its work.
            config: what it was called with.
        """
        given = config["checkpoint"]
        trainer = getattr(runner, "trainer", None)
        # Trainers other than ours do not say; fairchem's way for those.
        if trainer is None or not getattr(trainer, "in_training", True):
            logging.info("Nothing has been trained yet: the job starts again from what it was given.")
            if trainer is not None:
                config["timestamp_id"] = trainer.timestamp_id
            return DelayedSubmission(type(runner)(), config)
        submission = checkpoint(runner, config)
        (next_config,) = submission.args
        if not Path(next_config["checkpoint"]).exists():
            next_config["checkpoint"] = given
        return submission

    return mended
