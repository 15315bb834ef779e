"""fairchem's trainer, except that a run which stops at any moment goes on as if it had not.

Checkpoints are written aside and renamed, and always hold a complete step; what is random in a step is a
function of (seed, step, rank); after loading, the schedule stands where the step does. On CPU a resumed run
is the undisturbed one bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer
from fairchem.core.modules.normalization.element_references import create_element_references
from fairchem.core.modules.normalization.normalizer import create_normalizer
from torch import Tensor

from fairchem_dens import checkpoints
from fairchem_dens.checkpoints.fine_tuning import CHECKPOINT, WHERE, FineTuning
from fairchem_dens.errors import CheckpointNotWritten
from fairchem_dens.randomness import derived_seed
from fairchem_dens.relaxation import complete_trajectories
from fairchem_dens.training.interrupts import Interrupts
from fairchem_dens.training.moving_average import ForeachAverage


class ResumableTrainer(EquiformerV2ForcesTrainer):
    """Trains energies and forces; knows nothing of DeNS. Takes the arguments of fairchem's trainers."""

    # Set by fairchem, which does not annotate them.
    config: dict[str, Any]
    step: int
    epoch: float
    ema: Any
    logger: Any
    evaluator: Any
    best_val_metric: Any
    clip_grad_norm: float | None
    output_targets: dict[str, dict[str, Any]]

    in_training = False
    """Whether `train` is under way, so that there is a state of a run to save."""
    _updating = False
    """Whether the optimizer is changing the weights, which then belong to no step."""
    _step_of_weights = 0
    """The step whose update the weights hold; fairchem counts a step before it is made."""
    _step_of_file = -1
    fine_tuning: FineTuning | None = None
    """Where a run that does not resume takes its first weights from; None makes them."""
    _loaded_from: str | None = None
    _loaded_state_of_run = False

    @staticmethod
    def _get_timestamp(device: torch.device, suffix: str | None) -> str:
        """Name a run by its start to the second, the same on all ranks.

        fairchem rounds to single precision, about two minutes, and a run that finds a checkpoint under its
        name resumes it: of two runs that start close together the second would continue the first.
        """
        now = torch.tensor(int(datetime.datetime.now().timestamp()), device=device)
        distutils.broadcast(now, 0)
        name = datetime.datetime.fromtimestamp(now.item()).strftime("%Y-%m-%d-%H-%M-%S")
        return f"{name}-{suffix}" if suffix else name

    def load(self, inference_only: bool) -> None:
        """Build everything; write into the configuration what made it."""
        self.config["fairchem_dens"] = checkpoints.mark()
        if self.fine_tuning is not None:
            self.config["fairchem_dens"]["fine_tuned_from"] = dataclasses.asdict(self.fine_tuning)
        self.seed: int = self.config["cmd"]["seed"]
        self._interrupts = Interrupts(self._save_and_stop)
        super().load(inference_only)

    def load_optimizer(self) -> None:
        """Build the optimizer, and notice when it begins to change the weights."""
        super().load_optimizer()
        self.optimizer.register_step_pre_hook(self._begin_update)

    def load_extras(self) -> None:
        """Build schedule, clipping and moving average."""
        optim = self.config["optim"]
        if "scheduler_params" in optim:
            # fairchem turns epochs into steps in place; a warm-up that rounds to no step would divide by
            # zero.
            params = optim["scheduler_params"] = copy.deepcopy(optim["scheduler_params"])
            if self.train_loader is not None and "warmup_epochs" in params:
                one_step = (1 + 1e-9) / len(self.train_loader)
                params["warmup_epochs"] = max(params["warmup_epochs"], one_step)
            super().load_extras()
        else:
            super(EquiformerV2ForcesTrainer, self).load_extras()
        if self.ema is not None:
            self.ema = ForeachAverage(self.model.parameters(), self.ema_decay)

    def train(self, disable_eval_tqdm: bool = False) -> None:
        """Train to the end, which always leaves a checkpoint; a signal or an error on the way does too.

        Raises:
            FileNotFoundError: the checkpoint to fine-tune from does not exist.
            ValueError: it does not fit; a checkpoint was loaded that holds no run to resume; or there are no
                data to train on.
            CheckpointNotWritten: there is no room for a checkpoint, or another reason not to write one.
        """
        if self.train_loader is None:
            raise ValueError(
                "'dataset.train.src' is missing, so there is nothing to train on: name the folder of LMDBs."
            )
        if distutils.is_master() and not self.is_debug:
            checkpoints.remove_unfinished(self.config["cmd"]["checkpoint_dir"])
        self._start()
        self.in_training = True
        try:
            with self._interrupts.watched(), self._last_step_kept():
                self._run(disable_eval_tqdm)
        finally:
            self.in_training = False

    def _run(self, disable_eval_tqdm: bool) -> None:
        self._repeat_interrupted_evaluation(disable_eval_tqdm)
        super().train(disable_eval_tqdm=disable_eval_tqdm)
        # fairchem writes a file every `eval_every` steps, which a short run may never reach.
        if self._step_of_file != self.step:
            self.save(checkpoint_file="checkpoint.pt", training_state=True)

    @contextlib.contextmanager
    def _last_step_kept(self) -> Iterator[None]:
        """Whatever ends the run inside this block, the last complete step is in a file before."""
        try:
            yield
        except (SystemExit, CheckpointNotWritten):
            raise  # it has been written, or cannot be
        except BaseException as error:
            if not self._updating and self._step_of_weights > max(self._step_of_file, 0):
                logging.error(
                    f"{type(error).__name__}: {error}\nBefore this ends the run: writing a checkpoint of "
                    f"step {self._step_of_weights}, the last complete one."
                )
                try:
                    self.save(checkpoint_file="checkpoint.pt", training_state=True)
                except Exception as second:  # the first error is the one to see
                    logging.error(f"That failed as well: {type(second).__name__}: {second}")
            raise

    def _start(self) -> None:
        """Resume what was loaded, fine-tune, or begin anew."""
        if self._loaded_from is not None:
            if not self._loaded_state_of_run:
                raise ValueError(
                    f"'{self._loaded_from}' holds weights but not the state of a run (no optimizer), so it "
                    f"cannot be resumed. To fine-tune from it, leave out --checkpoint and set "
                    f"'{WHERE}.starting_checkpoint'."
                )
            logging.info(f"Resuming '{self._loaded_from}' after step {self.step}.")
        elif self.fine_tuning is not None:
            self._fine_tune(self.fine_tuning)

    def _fine_tune(self, start: FineTuning) -> None:
        """Take the weights of a checkpoint, and its normalisers if that is asked for; all else is fresh."""
        file, model = start.starting_checkpoint, self._unwrapped_model
        checkpoint = checkpoints.read(file, map_location=self.device)
        checkpoints.require_fit(checkpoint, model, self.config["model"], file)
        start.check_normalizers(checkpoint["normalizers"], self.normalizers)
        checkpoints.load(checkpoints.predicting_weights(checkpoint), model)
        if self.ema is not None:
            self.ema = ForeachAverage(self.model.parameters(), self.ema_decay)
        if start.normalizers == CHECKPOINT:
            self._use_normalizers_of(checkpoint, file)
        average = "" if checkpoint.get("ema") is None else ", in their moving average"
        logging.info(
            f"Fine-tuning: weights of '{file}' (step {checkpoint.get('step', 'unknown')}{average}); step 0, "
            "and optimizer, schedule and moving average are fresh."
        )
        for target, normalizer in self.normalizers.items():
            logging.info(
                f"Fine-tuning: normaliser of {target} from the {start.normalizers}: mean "
                f"{normalizer.mean.item():.6g}, rmsd {normalizer.rmsd.item():.6g}."
            )

    def _use_normalizers_of(self, checkpoint: dict[str, Any], file: str) -> None:
        """Replace normalisers and element references by those of a checkpoint."""
        self.normalizers = {
            target: create_normalizer(state_dict=state).to(self.device)
            for target, state in checkpoint["normalizers"].items()
        }
        self.elementrefs = {
            target: create_element_references(state_dict=state).to(self.device)
            for target, state in checkpoint["elementrefs"].items()
        }

    def _repeat_interrupted_evaluation(self, disable_eval_tqdm: bool) -> None:
        """Evaluate once more where the file was written just before an evaluation that may not have ended.

        An evaluation depends on nothing but the weights, so repeating a finished one changes nothing.
        """
        eval_every = self.config["optim"].get("eval_every", len(self.train_loader))
        if self.step == 0 or self.step % eval_every or self.val_loader is None or self.primary_metric is None:
            return
        metrics = self.validate(split="val", disable_tqdm=disable_eval_tqdm)
        if metrics[self.primary_metric]["metric"] == self.best_val_metric:
            # It was the best itself: its checkpoint, or the predictions with it, may be what was interrupted.
            self.best_val_metric = 1e9 if "mae" in self.primary_metric else -1.0
        self.update_best(self.primary_metric, metrics, disable_eval_tqdm=disable_eval_tqdm)

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        with self._seeded():
            return super()._forward(batch)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Make dropout and the like a function of (seed, step, rank); leave no trace in evaluation."""
        if self.model.training:
            torch.manual_seed(derived_seed(self.seed, self.step, distutils.get_rank()))
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            yield

    def _begin_update(self, *_: Any) -> None:
        self._updating = True
        self._interrupts.hold()

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        self._step_of_weights = self.step
        self._updating = False
        self._interrupts.release()

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> Any:
        """Evaluate with averaged weights; see fairchem's trainer."""
        with self._own_weights_back():
            return super().validate(split=split, disable_tqdm=disable_tqdm)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with averaged weights; see fairchem's trainer."""
        with self._own_weights_back():
            return super().predict(*args, **kwargs)

    def run_relaxations(self) -> Any:
        """Relax with averaged weights; see fairchem's trainer."""
        with self._own_weights_back(), complete_trajectories():
            return super().run_relaxations()

    @contextlib.contextmanager
    def _own_weights_back(self) -> Iterator[None]:
        """Put back the weights that fairchem swaps for their average, even where fairchem forgets."""
        outer = self.ema.collected_params if self.ema is not None else []
        try:
            yield
        finally:
            if self.ema is not None and self.ema.collected_params is not outer:
                self.ema.restore()
                self.ema.collected_params = outer

    def save(
        self,
        metrics: Any = None,
        checkpoint_file: str = "checkpoint.pt",
        training_state: bool = True,
    ) -> str | None:
        """Write a checkpoint of the last complete step; a kill at any moment leaves the previous file.

        Returns:
            Its path on the master rank. None elsewhere, and if the optimizer is just changing the weights:
            then the previous file stands.

        Raises:
            CheckpointNotWritten: the disk is full, or the file cannot be written for another reason; the
                previous file stands.
        """
        if self._updating:
            logging.warning(
                "No checkpoint written in the middle of a weight update: the previous one stands."
            )
            return None
        self.config = checkpoints.plain(self.config)
        final = Path(self.config["cmd"]["checkpoint_dir"]) / checkpoint_file
        with checkpoints.replacing(final) as beside, self._at_complete_step(), self._own_weights_back():
            written = super().save(checkpoints.plain(metrics), beside.name, training_state)
            step = self.step
        if training_state:
            self._step_of_file = step
        return None if written is None else str(final)

    @contextlib.contextmanager
    def _at_complete_step(self) -> Iterator[None]:
        """Show fairchem's `save` the step that the weights belong to, and the weights, not their average."""
        step, epoch = self.step, self.epoch
        averaged = self.ema.collected_params if self.ema is not None else []
        if step != self._step_of_weights:
            self.step = self._step_of_weights
            self.epoch = self.step / len(self.train_loader)
        if averaged:
            self.ema.restore()
            self.ema.collected_params = []
        try:
            yield
        finally:
            self.step, self.epoch = step, epoch
            if averaged:
                self.ema.collected_params = averaged
                self.ema.copy_to()

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        """Load weights and, unless for inference only, the state of the run.

        For inference only, the weights are their moving average, where the file has one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a checkpoint that this version reads, or its parameters are not this model's
                (unless ``task.strict_load`` is False); names the first of them.
        """
        if checkpoint is None:
            logging.info(f"Loading checkpoint from: {checkpoint_path}")
            checkpoint = checkpoints.read(checkpoint_path, map_location=self.device)
        checkpoint = checkpoints.upgraded(checkpoint)
        model = self._unwrapped_model
        if (self.config.get("task") or {}).get("strict_load", True):
            checkpoints.require_fit(checkpoint, model, self.config["model"], str(checkpoint_path))
        if inference_only:
            weights = checkpoints.predicting_weights(checkpoint, checkpoints.trained_names(model))
            checkpoint = {**checkpoint, "state_dict": weights, "ema": None}
        elif getattr(self, "scheduler", None) is None:
            checkpoint = {**checkpoint, "scheduler": None}
        if not inference_only:
            checkpoint = self._take_state(checkpoint)
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        self._step_of_weights = self._step_of_file = self.step
        if not inference_only:
            self._loaded_from, self._loaded_state_of_run = str(checkpoint_path), "optimizer" in checkpoint
            self._catch_up_scheduler()

    def _take_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Take what fairchem does not know out of a checkpoint; return it as fairchem is to load it."""
        return checkpoint

    def _catch_up_scheduler(self) -> None:
        """Bring the schedule to `self.step`: fairchem writes the file before it advances the schedule."""
        scheduler = getattr(getattr(self, "scheduler", None), "scheduler", None)
        if scheduler is None or self.scheduler.scheduler_type in ("Null", "ReduceLROnPlateau"):
            return
        while scheduler.last_epoch < self.step:
            scheduler.step()

    def _save_and_stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._step_of_weights > 0:
            logging.warning(f"{name}: writing a checkpoint of step {self._step_of_weights} and stopping.")
            self.save(checkpoint_file="checkpoint.pt", training_state=True)
        else:
            logging.warning(f"{name}: stopping; no step is complete yet.")
        raise SystemExit(128 + number)
