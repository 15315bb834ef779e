"""The text that ``fairchem --submit`` would hand to sbatch, without handing it over.

fairchem's own `main` is run up to the moment of submission, with an executor that writes the script and stops
there. So the script is that of a real submission, also when fairchem or submitit change their minds.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from fairchem.core import _cli
from submitit import AutoExecutor
from submitit.slurm.slurm import SlurmExecutor


def job_script(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Return the job script of a submission.

    Args:
        arguments: of the ``fairchem`` command, with ``submit`` set.
        overrides: its other arguments, such as ``--optim.batch_size=8``.
    """
    with _writing_instead_of_submitting():
        try:
            _cli.main(arguments, list(overrides))
        except _Script as script:
            return str(script)
    raise RuntimeError("fairchem did not submit anything.")


class _Script(BaseException):
    """Carries the script out of fairchem's `main`; no error, so nobody on the way is to catch it."""


class _ScriptWriter(AutoExecutor):
    """Takes the parameters of a job as submitit does."""

    def __init__(self, folder: Any, **settings: Any) -> None:
        super().__init__(folder, cluster="slurm", **settings)

    def map_array(self, _function: Any, configs: Sequence[Any]) -> list[Any]:
        slurm = self._executor
        if len(configs) > 1:  # submitit makes an array of several jobs only
            slurm.parameters["map_count"] = len(configs)
        raise _Script(slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run"))


@contextlib.contextmanager
def _writing_instead_of_submitting() -> Iterator[None]:
    """Give fairchem that executor, and submitit the belief that there is a SLURM here."""
    executor, affinity = _cli.AutoExecutor, SlurmExecutor.__dict__["affinity"]
    logging.disable(logging.INFO)  # fairchem says that it submits
    _cli.AutoExecutor = _ScriptWriter
    SlurmExecutor.affinity = classmethod(lambda _cls: 2)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        _cli.AutoExecutor, SlurmExecutor.affinity = executor, affinity
