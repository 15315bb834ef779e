"""`fairchem-dens submit`: a training job for SLURM, with the arithmetic of its batch before it is queued."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairchem.core import _cli
from fairchem.core.common.flags import flags
from fairchem.core.common.utils import build_config, create_grid

from fairchem_dens import config as settings_of_runs
from fairchem_dens.launch.job_script import job_script
from fairchem_dens.launch.partitions import check_partition
from fairchem_dens.launch.world import World, written_batch

HELP = """\
All other arguments are those of the fairchem command, which submits the job:

  --config-yml FILE            the run (needed)
  --num-nodes N --num-gpus N   nodes, and GPUs on each (1, 1)
  --slurm-partition NAME, --slurm-account NAME, --slurm-qos NAME
  --slurm-mem GB               memory of each node (80)
  --slurm-timeout HOURS        wall time; a job whose time is up is requeued and goes on (72)
  --identifier NAME --run-dir FOLDER --logdir FOLDER --amp --seed N
  --sweep-yml FILE             one job for each combination of its values
  --KEY.KEY=VALUE              a setting of the YAML, e.g. --optim.batch_size=8

example:
  fairchem-dens submit --dry-run --config-yml configs/oc20/equiformer_v2_dens_2M_12ep.yml --amp \\
    --num-nodes 2 --num-gpus 8 --slurm-partition PARTITION --slurm-mem 480
"""

REQUEUES = 3
"""How often fairchem has a job requeued because its time was up; preemptions do not count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry-run`; all else is left for fairchem."""
    parser.usage = "%(prog)s [--dry-run] --config-yml FILE [argument of fairchem ...]"
    parser.epilog = HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch and the job script, and submit nothing"
    )
    parser.set_defaults(takes_the_rest=True)


def run(args: argparse.Namespace) -> int:
    """Prints what would be submitted and submits it, or not; returns the exit status.

    Raises:
        ValueError: an argument or a setting is missing or impossible, or there is no SLURM.
        FileNotFoundError: the YAML or the sweep file does not exist.
    """
    arguments, overrides = _parse(args.rest)
    config = build_config(arguments, overrides)
    _check(config)
    check_partition((config.get("slurm") or {}).get("partition", arguments.slurm_partition))
    configs = create_grid(config, arguments.sweep_yml) if arguments.sweep_yml else [config]
    for line in describe(arguments, configs):
        print(line)
    for warning in warnings(arguments, configs):
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        print(f"\n{job_script(arguments, overrides)}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError(
            "There is no sbatch here, so no SLURM to submit to. --dry-run shows the job; the fairchem "
            "command without --submit trains on this machine."
        )
    sys.stdout.flush()
    _cli.main(arguments, overrides)
    return 0


def describe(arguments: argparse.Namespace, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines that say what a submission is."""
    rank = "process" if arguments.cpu else "GPU"
    batches = list(dict.fromkeys(_world(arguments, config).arithmetic(rank) for config in configs))
    written = written_batch(arguments.config_yml)
    cpus = configs[0]["optim"]["num_workers"] + 1
    logs = Path(arguments.logdir).absolute() / "JOB"
    lines = [f"run     {arguments.config_yml}" + (f", {len(configs)} jobs" if len(configs) > 1 else "")]
    lines += [f"batch   {batch}" for batch in batches]
    if written is not None:
        lines.append(f"        the YAML was written for {written.global_batch}")
    return [
        *lines,
        f"node    {arguments.num_gpus} × {cpus} CPUs (optim.num_workers + 1), {arguments.slurm_mem} GB",
        f"time    {arguments.slurm_timeout} h, then up to {REQUEUES} times again; preemptions do not count",
        f"logs    {logs}/JOB_0_log.out, and .err; JOB is the job's number",
        f"runs    {Path(arguments.run_dir).absolute()}/checkpoints/TIME-{arguments.identifier or 'NAME'}",
    ]


def warnings(arguments: argparse.Namespace, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what its user may not want of a submission."""
    written = written_batch(arguments.config_yml)
    found = []
    if written is not None and arguments.mode == "train":
        found = [written.warning(_world(arguments, config)) for config in configs]
    if arguments.timestamp_id is not None and len(configs) > 1:
        found.append(
            f"--timestamp-id {arguments.timestamp_id} is one name for {len(configs)} jobs, which would write "
            "the same files: leave it out"
        )
    return list(dict.fromkeys(warning for warning in found if warning is not None))


def _world(arguments: argparse.Namespace, config: Mapping[str, Any]) -> World:
    return World(
        nodes=arguments.num_nodes,
        ranks_per_node=arguments.num_gpus,
        batch_size=config["optim"].get("batch_size", 1),
    )


def _parse(rest: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read fairchem's arguments, as it does."""
    mode = [] if any(argument.split("=")[0] == "--mode" for argument in rest) else ["--mode", "train"]
    arguments, overrides = flags.get_parser().parse_known_args([*rest, *mode, "--submit"])
    for file, option in ((arguments.config_yml, "--config-yml"), (arguments.sweep_yml, "--sweep-yml")):
        if file is not None and not file.is_file():
            hint = " (`fairchem-dens configs list` shows those that ship)" if option == "--config-yml" else ""
            raise FileNotFoundError(f"{option} names '{file}', which is not a file{hint}.")
    for override in overrides:
        if not override.startswith("--") or override.count("=") != 1:
            raise ValueError(
                f"'{override}' is neither an option of the fairchem command nor a setting such as "
                "--optim.batch_size=8."
            )
    if arguments.gp_gpus is not None:
        raise ValueError("--gp-gpus: graph parallelism is not supported by DeNSTrainer. Remove it.")
    return arguments, overrides


def _check(config: Mapping[str, Any]) -> None:
    """Refuse at once what would end the job after it has waited in the queue."""
    if not isinstance(config.get("optim"), Mapping):
        raise ValueError("'optim' is missing from the YAML.")
    workers = config["optim"].get("num_workers")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(
            "'optim.num_workers' must be a whole number, 0 or more: fairchem asks for that many CPUs and one "
            f"more for each rank. Found {workers!r}."
        )
    # The job inherits this environment: a variable that is not set here is not set there.
    settings_of_runs.tidied(config.get("dataset") or {})
