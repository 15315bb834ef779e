"""The trainers of the experiments: `DeNSTrainer` with a record of its evaluations, and one with a fault."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairchem_dens import keys
from fairchem_dens.trainer import DeNSTrainer

HISTORY_FILE = "history.jsonl"
"""One line for each evaluation, beside the checkpoints."""


class RecordingTrainer(DeNSTrainer):
    """`DeNSTrainer` that writes down each evaluation and the seconds that training took up to it.

    The seconds are those of the processor on a CPU, so that what else the machine does does not count, and
    those of the clock on a GPU. Evaluations are left out.
    """

    _seconds = 0.0
    _since: float | None = None

    def train(self, disable_eval_tqdm: bool = False) -> None:
        """Train, with a clock."""
        done = [line for line in read_history(self._file) if line["step"] <= self.step]
        self._seconds = done[-1]["seconds"] if done else 0.0
        self._since = self._now()
        super().train(disable_eval_tqdm)

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> Any:
        """Evaluate while the clock stands."""
        if self._since is not None:
            self._seconds += self._now() - self._since
        metrics = super().validate(split, disable_tqdm)
        if self._since is not None:
            found = {name: value["metric"] for name, value in metrics.items()}
            line = {"step": self.step, "epoch": self.epoch, "seconds": self._seconds, **found}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._since = self._now()
        return metrics

    @property
    def _file(self) -> Path:
        return Path(self.config["cmd"]["checkpoint_dir"]) / HISTORY_FILE

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class FairchemLossTrainer(RecordingTrainer):
    """Trains with the loss that fairchem-core 1.10.0's own DeNS trainer computes.

    In a denoising step that trainer adds the right term and then a second one: the force coefficient times
    the distance to a target that is normalised twice, over fixed atoms too. There a step is one of denoising
    for all structures of a batch (``switch: batch``), and so it must be here.
    """

    def _force_and_noise_loss(self, out: dict[str, Tensor], batch: Any) -> Tensor:
        right = super()._force_and_noise_loss(out, batch)
        if not bool(batch[keys.CORRUPTED].any()):
            return right
        assert self.corruption is not None
        normalizer, mask = self.normalizers[keys.FORCES], batch[keys.NOISE_MASK][:, None]
        once = torch.where(
            mask,
            batch[keys.NOISE_VEC] / self.corruption.noise_scale,
            normalizer.norm(batch[keys.FORCES]),
        )
        # That model returns one tensor, the noise where an atom was corrupted and the force elsewhere.
        predicted = torch.where(mask, out[keys.NOISE], out[keys.FORCES])
        second = (predicted - normalizer.norm(once)).norm(dim=-1).mean()
        return right + dict(self.loss_functions)[keys.FORCES]["coefficient"] * second


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run by step; of a step that was evaluated twice, the last."""
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]
