"""fairchem's trainer, except that a step does not wait for the device and a sick one does no harm.

fairchem's loop runs as it is. The hooks that it calls keep loss and metrics where they arise, and hand it
plain numbers in the steps that it prints.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.modules.evaluator import Evaluator
from torch import Tensor

from fairchem_dens import keys, objective
from fairchem_dens.objective import Mean
from fairchem_dens.resumable import ResumableTrainer
from fairchem_dens.training import finite, loggers, measures, meters, precision, running
from fairchem_dens.training.finite import BadSteps
from fairchem_dens.training.in_flight import HostSizes, InFlight
from fairchem_dens.training.selection import select
from fairchem_dens.training.settings import StepSettings

_FUSED = ("Adam", "AdamW")
"""Optimizers that torch has in one kernel which can pass over an update on the device."""
_CHOSEN = ("fused", "foreach", "capturable", "differentiable")
"""Arguments by which a user chooses an implementation."""
_LOSS = "loss"
_SKIPPED = "skipped_steps"


class StepTrainer(ResumableTrainer):
    """Trains energies and forces; knows nothing of DeNS. Takes the arguments of fairchem's trainers.

    Raises:
        ValueError: ``optim.amp_dtype`` or ``optim.max_bad_steps_in_a_row`` is impossible.
    """

    # Set by fairchem, which does not annotate them.
    metrics: Any
    loss_functions: list[tuple[str, dict[str, Any]]]
    elementrefs: dict[str, Any]

    # ------------------------------------------------------------------ construction

    def load(self, inference_only: bool) -> None:
        """Build everything."""
        self.step_settings = StepSettings.from_config(self.config["optim"])
        self._in_flight: InFlight | None = None
        self._outputs: dict[str, Tensor] = {}
        self._loss_of_step: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._running = running.RunningMeans(self.device)
        on_gpu = self.device.type == "cuda"
        self.bad_steps = BadSteps(self.step_settings.max_bad_steps_in_a_row, delay=1 if on_gpu else 0)
        if precision.needs_no_scaler(self.config["amp"], self.step_settings):
            self.scaler = None
        elif said := precision.without_effect(self.config["amp"], self.step_settings, self.device):
            logging.warning(said)
        super().load(inference_only)

    def load_logger(self) -> None:
        """Open the logger; see `PatientLogger` for what is between it and fairchem."""
        super().load_logger()
        if self.logger is not None:
            self.logger = loggers.PatientLogger(self.logger, self.config["cmd"]["print_every"])

    def load_task(self) -> None:
        """Read what is predicted and evaluated."""
        super().load_task()
        self.evaluator = running.RunningEvaluator(
            task=self.name, eval_metrics=dict(self.evaluator.target_metrics)
        )

    def load_optimizer(self) -> None:
        """Build the optimizer, in one kernel where the device has one and the user has not chosen."""
        optim = self.config["optim"]
        written = optim.get("optimizer_params")
        params = dict(written or {})
        if (
            self.device.type == "cuda"
            and optim.get("optimizer", "AdamW") in _FUSED
            and not params.keys() & set(_CHOSEN)
        ):
            # Not for good: the configuration goes into checkpoints, which are opened on other devices.
            optim["optimizer_params"] = params | {"fused": True}
        try:
            super().load_optimizer()
        finally:
            if written is not None:
                optim["optimizer_params"] = written
            else:
                optim.pop("optimizer_params", None)
        self.optimizer.register_step_pre_hook(self._before_update)

    def load_extras(self) -> None:
        """Build schedule and moving average; the clipping of gradients is done before the update, here."""
        super().load_extras()
        self._max_norm, self.clip_grad_norm = self.clip_grad_norm or None, None

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        """Load weights and, unless for inference only, the state of the run; see `ResumableTrainer`."""
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        self._running = running.RunningMeans(self.device)

    def _take_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        mark = (checkpoint.get("config") or {}).get("fairchem_dens") or {}
        self.bad_steps.total = int(mark.get(_SKIPPED, 0))
        if "optimizer" in checkpoint:
            # Which kernels update the weights is a matter of this device, not of the one before.
            state = checkpoint["optimizer"]
            groups = [
                {**group, **{name: ours[name] for name in _CHOSEN if name in ours}}
                for group, ours in zip(state["param_groups"], self.optimizer.param_groups, strict=False)
            ]
            if len(groups) == len(state["param_groups"]):
                checkpoint = {**checkpoint, "optimizer": {**state, "param_groups": groups}}
        return super()._take_state(checkpoint)

    # ------------------------------------------------------------------ a run

    def _run(self, disable_eval_tqdm: bool) -> None:
        self._stopwatch = meters.Stopwatch()
        super()._run(disable_eval_tqdm)
        self.bad_steps.finish()

    def train(self, disable_eval_tqdm: bool = False) -> None:
        """Train; see `ResumableTrainer`.

        Raises:
            TooManyBadSteps: loss or gradient were not finite too often; a checkpoint of the last good state
                is left.
        """
        try:
            super().train(disable_eval_tqdm=disable_eval_tqdm)
        finally:
            if self.logger is not None:
                self.logger.flush()
            if self.bad_steps.total and distutils.is_master():
                logging.warning(
                    f"{self.bad_steps.total} steps of this run were skipped, as loss or gradient were not "
                    "finite."
                )

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> Any:
        """Evaluate with averaged weights; see fairchem's trainer."""
        with self._not_training():
            return super().validate(split=split, disable_tqdm=disable_tqdm)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with averaged weights; see fairchem's trainer."""
        with self._not_training():
            return super().predict(*args, **kwargs)

    def run_relaxations(self) -> Any:
        """Relax with averaged weights; see fairchem's trainer."""
        with self._not_training():
            return super().run_relaxations()

    def save(
        self,
        metrics: Any = None,
        checkpoint_file: str = "checkpoint.pt",
        training_state: bool = True,
    ) -> str | None:
        """Write a checkpoint; see `ResumableTrainer`."""
        self.config["fairchem_dens"][_SKIPPED] = self.bad_steps.total
        with self._not_training():
            return super().save(metrics, checkpoint_file, training_state)

    def _not_training(self) -> AbstractContextManager[None]:
        return self._stopwatch.paused() if self.in_training else nullcontext()

    # ------------------------------------------------------------------ a step

    @property
    def _in_step(self) -> bool:
        """Whether fairchem's loop is in a step of training, whose numbers stay on the device."""
        return self.in_training and bool(self.model.training)

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        self._in_flight = InFlight.of(batch)
        batch.to(self.device, non_blocking=True)  # out of pinned memory
        with precision.autocast(self.config["amp"], self.step_settings, self.device):
            return precision.single(super()._forward(self._in_flight.sized))

    def _on_host(self, batch: Any) -> InFlight:
        """What is known of a batch on the host."""
        if self._in_flight is None or self._in_flight.batch is not batch:
            self._in_flight = InFlight.of(batch)
        return self._in_flight

    def _sized(self, batch: Any) -> HostSizes:
        """The batch with its sizes on the host, for fairchem's code that makes shapes of them."""
        return self._on_host(batch).sized

    def _compute_loss(self, out: dict[str, Tensor], batch: Any) -> Tensor:
        loss = self._loss(out, batch)
        self._loss_of_step = loss.detach()
        return running.unread(loss) if self._in_step else loss

    def _loss(self, out: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The loss of this rank, such that the mean over ranks is that of the global batch."""
        return self._sum_of_losses(out, batch, [target for target, _ in self.loss_functions])

    def _sum_of_losses(self, out: Mapping[str, Tensor], batch: Any, targets: list[str]) -> Tensor:
        losses = dict(self.loss_functions)
        return objective.sum_of_losses(
            [self._errors(target, losses[target], out, batch) for target in targets],
            sum_over_ranks=self._sum_over_ranks,
            num_ranks=distutils.get_world_size(),
        )

    def _errors(
        self, target: str, info: Mapping[str, Any], out: Mapping[str, Tensor], batch: Any
    ) -> objective.Errors:
        settings, prediction = self.output_targets[target], out[target]
        wanted = self._normalized(target, batch[target].view(len(prediction), -1), batch)
        if prediction.shape != wanted.shape:
            raise ValueError(
                f"The model predicts '{target}' of the shape {tuple(prediction.shape)}, the data have "
                f"{tuple(wanted.shape)}."
            )
        free_only = settings["level"] == "atom" and settings.get("train_on_free_atoms", True)
        return objective.Errors(
            values=info["fn"].loss_fn(prediction, wanted, batch[keys.NATOMS]),
            mask=(batch[keys.FIXED] == 0) if free_only else None,
            coefficient=info["coefficient"],
            mean=info["fn"].reduction == "mean",
        )

    def _normalized(self, target: str, values: Tensor, batch: Any) -> Tensor:
        if target in self.elementrefs:
            values = self.elementrefs[target].dereference(values, self._sized(batch))
        if target in self.normalizers:
            values = self.normalizers[target].norm(values)
        return values

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return distutils.all_reduce(values, device=self.device)

    def _backward(self, loss: Tensor) -> None:
        self._grad_norm = None
        super()._backward(finite.poisoned(loss))
        finite.forget_skip(self.optimizer)
        if self.in_training:
            self._end_step()

    def _before_update(self, *_: Any) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._grad_norm = finite.clip(parameters, self._max_norm)
        finite.skip_if(~torch.isfinite(self._grad_norm), self.optimizer)

    def _end_step(self) -> None:
        """Add up what the step has measured, in the steps that are printed over all ranks."""
        assert self._loss_of_step is not None
        loss, norm, outputs = self._loss_of_step, self._grad_norm, self._outputs
        self._loss_of_step, self._grad_norm, self._outputs = None, None, {}
        if norm is None:  # the scaler has found what is not finite, and not called the optimizer
            norm = torch.full_like(loss, torch.inf)
        self._running.add("grad_norm", norm)
        self._running.end_step()
        self.metrics = {}
        if self.step % self.config["cmd"]["print_every"] == 0:
            self.metrics = self._printed(self._running.take(self._sum_over_ranks))
        self.bad_steps.ended(
            self.step, bad=~torch.isfinite(norm), loss=loss, in_flight=self._in_flight, outputs=outputs
        )

    def _printed(self, means: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return what fairchem prints and logs in a step, by name; the same on all ranks."""
        seconds = self._stopwatch.lap()
        rates = {}
        for what in ("structures", "atoms"):
            counted = means.pop(what, None)
            if counted is not None:
                rates[f"throughput_{what}_per_s"] = counted["total"] / seconds
        numbers = rates | meters.memory(self.device) | {_SKIPPED: float(self.bad_steps.total)}
        return means | {name: {"metric": value} for name, value in numbers.items()}

    # ------------------------------------------------------------------ metrics

    def _metric_names(self) -> list[str]:
        """Return the names of all metrics, the same on all ranks."""
        asked = self.evaluator.target_metrics.items()
        return [
            measures.metric_name(target, function) for target, functions in asked for function in functions
        ]

    def _counted(self, batch: Any) -> Tensor:
        """Return which structures the metrics are about, (B,) bool."""
        return torch.ones_like(batch[keys.NATOMS].reshape(-1), dtype=torch.bool)

    def _measure(self, out: Mapping[str, Tensor], batch: Any, evaluator: Any) -> dict[str, Mean]:
        """Return all metrics of a batch; those that have no element are there as well."""
        evaluated = self._evaluated(out, batch)
        means = {}
        for target, functions in evaluator.target_metrics.items():
            for function in functions:
                if measures.is_known(target, function, self.output_targets):
                    mean = measures.measure(target, function, evaluated)
                else:
                    mean = self._measure_by_fairchem(target, function, out, batch, evaluated.structures)
                means[measures.metric_name(target, function)] = mean
        return means

    def _measure_for_print(self, out: Mapping[str, Tensor], batch: Any) -> dict[str, Mean]:
        """Return what is printed of a step beside the metrics; the same names in each step."""
        seen = self._on_host(batch)
        return {"structures": Mean(len(seen.natoms), 1), "atoms": Mean(seen.num_atoms, 1)}

    def _evaluated(self, out: Mapping[str, Tensor], batch: Any) -> measures.Evaluated:
        structures, of_atom = self._counted(batch), batch[keys.BATCH]
        free = batch[keys.FIXED] == 0
        natoms = torch.zeros(len(structures), dtype=torch.int64, device=free.device)
        natoms = natoms.index_add_(0, of_atom, free.long())
        if self._free_only(keys.FORCES):
            # fairchem takes the largest error over the free atoms of each structure; without one there is
            # nothing to take.
            structures = structures & (natoms > 0)
        predictions, targets, masks = {}, {}, {}
        for target, settings in self.output_targets.items():
            prediction = self._denorm_preds(target, out[target].detach(), self._sized(batch))
            predictions[target] = prediction.reshape(len(prediction), -1)
            targets[target] = batch[target].view(len(prediction), -1)
            masks[target] = structures
            if settings["level"] == "atom":
                masks[target] = structures[of_atom] & (free if self._free_only(target) else True)
        return measures.Evaluated(predictions, targets, masks, structures, natoms, of_atom)

    def _free_only(self, target: str) -> bool:
        return bool(self.output_targets.get(target, {}).get("eval_on_free_atoms", True))

    def _measure_by_fairchem(
        self, target: str, function: str, out: Mapping[str, Tensor], batch: Any, structures: Tensor
    ) -> Mean:
        """Return a metric that only fairchem knows, of the structures that count; waits for the device."""
        chosen = structures.nonzero().flatten().tolist()
        result: dict[str, Any] = {"total": 0.0, "numel": 0}
        if chosen:
            atomic = [name for name, settings in self.output_targets.items() if settings["level"] == "atom"]
            wanted = {name: out[name] for name in self.output_targets}
            some, selected = select(wanted, batch, self._sized(batch).natoms.tolist(), chosen, atomic)
            alone = Evaluator(task=self.name, eval_metrics={target: [function]})
            (result,) = super()._compute_metrics(some, selected, alone, {}).values()
        total, numel = (torch.tensor(result[key], dtype=torch.float64) for key in ("total", "numel"))
        return Mean(total.to(self.device), numel.to(self.device))

    def _compute_metrics(
        self, out: dict[str, Tensor], batch: Any, evaluator: Any, metrics: Any = None
    ) -> Any:
        means = self._measure(out, batch, evaluator)
        if self._in_step:
            self._outputs = {name: value.detach() for name, value in out.items()}
            for name, mean in (means | self._measure_for_print(out, batch)).items():
                self._running.add(name, *mean)
            return self._running
        metrics = {} if metrics is None else metrics
        for name, (total, numel) in running.on_host(means).items():
            if numel:
                evaluator.update(name, {"total": total, "numel": numel}, metrics)
        return metrics

    def _aggregate_metrics(self, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        """Add up over ranks what each has measured, in one collective of the names that all know."""
        names = [*self._metric_names(), _LOSS]
        nothing = {"total": 0.0, "numel": 0}
        sums = torch.tensor(
            [[float(metrics.get(name, nothing)[key]) for key in ("total", "numel")] for name in names],
            dtype=torch.float64,
            device=self.device,
        )
        return running.means_of(dict(zip(names, self._sum_over_ranks(sums).tolist(), strict=True)))
