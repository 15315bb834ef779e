"""The DeNS trainer: hooks around fairchem's trainer, none of its loops.

What it adds: arming the corruption, and in a step the coin of ``switch: batch``, the loss and the metrics of
corrupted structures. What it needs to stop and go on at any moment is in `fairchem_dens.resumable`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.modules import transforms as fairchem_transforms
from fairchem.core.modules.loss import DDPLoss
from torch import Tensor

from fairchem_dens import config, keys, objective, summary
from fairchem_dens.checkpoints.fine_tuning import KEY as FINE_TUNING
from fairchem_dens.checkpoints.fine_tuning import FineTuning
from fairchem_dens.corruption import Corruption, batch_is_corrupted, corrupt
from fairchem_dens.data import skipping
from fairchem_dens.data.collate import collate
from fairchem_dens.data.labels import check_labels_agree
from fairchem_dens.data.reader import with_our_readers
from fairchem_dens.data.references import ReferenceGuard, check_settings, origins
from fairchem_dens.graphed import GraphedSteps, is_wanted
from fairchem_dens.launch import workers as local_workers
from fairchem_dens.models.inputs import check_atomic_numbers, check_cells
from fairchem_dens.models.weight_decay import kept_from_decay
from fairchem_dens.objective import Mean
from fairchem_dens.settings import as_fairchem_reads, check_model_arguments, check_run
from fairchem_dens.training.precision import single
from fairchem_dens.training.step import StepTrainer
from fairchem_dens.transforms import ArmedCorruption
from fairchem_dens.validation import nearest

TASK = "s2ef"
"""fairchem's name for energies and forces; metrics and ``s2ef_predictions.npz`` follow from it."""
DOTTED_NAME = "fairchem_dens.trainer.DeNSTrainer"
_NUM_SAMPLED = 64


class DeNSTrainer(StepTrainer):
    """Trains any energy-and-force model of fairchem; a force-conditioned one with DeNS, if the YAML says so.

    Takes the arguments of fairchem's trainers. DeNS is switched on by ``dataset.train.transforms.dens``
    together with a ``noise`` entry in ``loss_functions``; the keys of the authors' code are accepted instead.

    Raises:
        ValueError: a setting is unknown, impossible or contradicts another; names its YAML key.
        FileNotFoundError: a data folder does not exist.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A dotted trainer name reaches this class without anything having been registered.
        _register()
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        if given.get("gp_gpus") is not None:
            raise ValueError(
                f"--gp-gpus {given['gp_gpus']}: graph parallelism is not supported by DeNSTrainer. The "
                "conditioning on forces is not split over ranks, and ranks that share a structure would drop "
                "out different parts of it. Remove --gp-gpus; each rank then has structures of its own."
            )
        check_run(given)
        for name in ("task", "evaluation_metrics"):  # an empty section of a YAML is one that is left out
            given[name] = {key: value for key, value in (given.get(name) or {}).items() if value is not None}
        given["name"] = TASK
        given["seed"] = given.get("seed") or 0
        dataset = config.tidied(config.with_relax_dataset(given["dataset"], given["task"]))
        given["optimizer"], given["dataset"], given["loss_functions"] = config.translate_authors_keys(
            given["optimizer"], dataset, given["loss_functions"]
        )
        given["optimizer"] = as_fairchem_reads(given["optimizer"])
        self.noise_loss, ordinary = config.take_noise_loss(given["loss_functions"])
        config.require_losses(given["loss_functions"], given["task"])
        config.check_targets(ordinary, given["outputs"] or {})
        if given["optimizer"].get("load_balancing") is not None:
            given["optimizer"].setdefault("load_balancing_on_error", "warn_and_no_balance")
        local_workers.check(given["optimizer"])
        self.fine_tuning, model = _without_fine_tuning(given["model"])
        given["model"] = self._model_settings(model)

        self.corruption: Corruption | None = None
        self._reference_guards: dict[str, ReferenceGuard] = {}
        self._steps_graphed: bool | None = None
        self._graphed: GraphedSteps | None = None
        self._graphed_step: GraphedSteps | None = None
        self._filled_in_coefficient: Tensor | None = None
        super().__init__(**given)

    def _model_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Name the model by its dotted path, found anywhere; leave out a noise head that nothing trains."""
        try:
            model = registry.get_model_class(settings["name"])
        except RuntimeError as error:
            near = nearest(settings["name"], registry.mapping["model_name_mapping"])
            raise ValueError(
                f"'model.name' names '{settings['name']}', which is not a model{near}."
            ) from error
        settings = dict(settings)
        if model.__module__.startswith("fairchem_dens."):
            check_model_arguments(model, settings)
            settings["name"] = f"fairchem_dens.models.{model.__name__}"
            # fairchem's collater reads this key, not the model's default, and else warns on every batch.
            settings.setdefault("otf_graph", True)
        if self.noise_loss is None and "predict_noise" in inspect.signature(model).parameters:
            settings.setdefault("predict_noise", False)
        return settings

    # ------------------------------------------------------------------ construction

    def load(self, inference_only: bool) -> None:
        """Build everything, then say what will happen."""
        self.config["trainer"] = DOTTED_NAME
        super().load(inference_only)
        if not inference_only and self.train_dataset is not None and distutils.is_master():
            self._say_what_will_happen()

    def load_model(self) -> None:
        """Build the model.

        Raises:
            ValueError: it cannot be built from its settings.
        """
        try:
            super().load_model()
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"'model': {self.config['model']['name']} cannot be built from these settings, "
                f"{type(error).__name__}: {error}"
            ) from error

    def load_datasets(self) -> None:
        """Open the data and arm the corruption on the train split.

        Raises:
            ValueError: a transform does not exist, or corruption and loss do not fit together.
            FileNotFoundError: a folder does not exist.
        """
        splits = {
            "train": self.config["dataset"],
            **{split: self.config[f"{split}_dataset"] for split in ("val", "test", "relax")},
        }
        inherited = {"format": self.config["dataset"].get("format", "lmdb")}
        for name, settings in splits.items():
            config.check_transforms(
                settings.get("transforms"), vars(fairchem_transforms), f"dataset.{name}.transforms"
            )
        config.check_sources({name: {**inherited, **settings} for name, settings in splits.items()})
        check_labels_agree(splits)
        self._load_with_our_readers()
        self._list_skipped_records()
        if self.train_dataset is not None:
            if len(self.train_dataset) == 0:
                raise ValueError(
                    "No structure of 'dataset.train.src' is left to train on: is it empty, or is "
                    "'dataset.train.max_atoms' too small?"
                )
            self._arm_corruption()

    def _load_with_our_readers(self) -> None:
        """Open the data; the configuration, which checkpoints hold, keeps the user's formats."""
        names = {"train": "dataset", **{split: f"{split}_dataset" for split in ("val", "test", "relax")}}
        written = {key: self.config[key] for key in names.values()}
        read = with_our_readers(
            {split: written[key] or {} for split, key in names.items()},
            keep_graph=not self.config["model"].get("otf_graph", False),
        )
        self.config.update({key: read[split] for split, key in names.items()})
        try:
            super().load_datasets()
        except ValueError as error:
            if "first_n" not in str(error):
                raise
            raise ValueError(f"'dataset': {error}") from error
        finally:
            self.config.update(written)

    def _list_skipped_records(self) -> None:
        """Let all processes that read the train split keep one list of what they skip."""
        dataset = _innermost(self.train_dataset)
        if getattr(dataset, "skip_bad_records", False) and not self.is_debug:
            folder = Path(self.config["cmd"]["results_dir"]) / skipping.FOLDER
            dataset.skipped = skipping.SkippedRecords(folder, distutils.get_rank())

    def train(self, disable_eval_tqdm: bool = False) -> None:
        """Train; see `StepTrainer` and `ResumableTrainer`."""
        try:
            super().train(disable_eval_tqdm=disable_eval_tqdm)
        finally:
            skipped = getattr(_innermost(self.train_dataset), "skipped", None)
            if skipped is not None and distutils.is_master() and (said := skipped.summary()):
                logging.warning(said)

    def _arm_corruption(self) -> None:
        """Put the corruption where the settings of ``dens`` stand, on the train split alone."""
        dataset = _innermost(self.train_dataset)
        settings = getattr(getattr(dataset, "transforms", None), "config", None) or {}
        name = config.dens_name(settings)
        if name is None:
            if self.noise_loss is not None:
                raise ValueError(
                    f"'{self.noise_loss.where}' is a loss on noise, but there is none: "
                    "'dataset.train.transforms' has no 'dens'. Add it (prob, std, corrupt_ratio), or remove "
                    "the loss."
                )
            return
        where = f"dataset.train.transforms.{name}"
        self.corruption = Corruption.from_config(settings[name], where=where)
        if self.noise_loss is None:
            raise ValueError(
                f"'{where}' corrupts structures, but 'loss_functions' has no 'noise' entry that learns from "
                "them. Add '- noise: {fn: l2mae, coefficient: 10}', or remove 'dens'."
            )
        if hasattr(dataset, "check_md_logs"):
            dataset.check_md_logs()
        sampler = self.train_sampler.sampler
        armed = ArmedCorruption(self.corruption, self.seed, epoch=lambda: sampler.epoch)
        # A new dict: fairchem shares this one with the other splits.
        dataset.transforms.config = {**settings, name: armed}

    def get_dataloader(self, dataset: Any, sampler: Any, workers: int | None = None) -> Any:
        """Build a loader whose workers know the transform, also where they start from nothing."""
        self.collater = partial(collate, otf_graph=self.config["model"].get("otf_graph", False))
        if workers is None:
            workers = local_workers.of_local_rank(self.config["optim"], self.config["slurm"], dataset)
        loader = super().get_dataloader(dataset, sampler, workers=workers)
        loader.worker_init_fn = _register
        return loader

    def load_references_and_normalizers(self) -> None:
        """Load or fit both; elements that the references say nothing about are refused from here on.

        Raises:
            ValueError: a file of references is not one, or the model adds references of its own.
        """
        where = "dataset.train.transforms.element_references"
        settings = (self.config["dataset"].get("transforms") or {}).get("element_references")
        check_settings(settings, where)
        if settings and self.config["model"].get("use_energy_lin_ref"):
            raise ValueError(
                f"'model.use_energy_lin_ref: True' and '{where}' would each add references to the energies: "
                "keep the second, and set 'use_energy_lin_ref' to False."
            )
        super().load_references_and_normalizers()
        self._guard_references(origins(settings, where))

    def load_checkpoint(
        self, checkpoint_path: str, checkpoint: dict[str, Any] | None = None, inference_only: bool = False
    ) -> None:
        """Load a checkpoint; the references in it are the ones that its weights were trained with.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a checkpoint that this version reads, or not one of this model.
        """
        # fairchem would copy them into those of the YAML, which may be for another number of elements.
        of_settings = dict(self.elementrefs)
        self.elementrefs.clear()
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        origin = f"the checkpoint '{checkpoint_path}'"
        self._guard_references(dict.fromkeys(self.elementrefs, origin))
        self.elementrefs = of_settings | self.elementrefs

    def _guard_references(self, origins: Mapping[str, str]) -> None:
        for target, references in self.elementrefs.items():
            origin = origins.get(target, "the file of references")
            self._reference_guards[target] = ReferenceGuard.of(references.element_references, origin)

    def load_loss(self) -> None:
        """Build the losses; the one on noise, which fairchem does not know, apart from the others.

        Raises:
            ValueError: the noise has no loss on forces beside it, or its own does not exist.
        """
        written = self.config["loss_functions"]
        _, self.config["loss_functions"] = config.take_noise_loss(written)
        try:
            super().load_loss()
        finally:
            self.config["loss_functions"] = written
        if self.corruption is None or self.noise_loss is None:
            return
        forces = dict(self.loss_functions).get(keys.FORCES)
        if forces is None:
            raise ValueError(
                "DeNS needs a loss on forces: add '- forces: {fn: l2mae, coefficient: ...}' to "
                "'loss_functions'."
            )
        if forces["fn"].reduction != "mean":
            raise ValueError(
                f"'loss_functions.forces.reduction' is {forces['fn'].reduction!r} and must be mean with "
                "DeNS, where forces and noise share one mean."
            )
        try:
            self._noise_error = DDPLoss(self.noise_loss.fn, reduction=None).loss_fn
        except RuntimeError as error:
            near = nearest(self.noise_loss.fn, registry.mapping["loss_name_mapping"])
            raise ValueError(
                f"'{self.noise_loss.where}.fn' names '{self.noise_loss.fn}', which is not a loss{near}."
            ) from error

    def load_optimizer(self) -> None:
        """Build the optimizer, with the paper's choice of what is decayed."""
        model = self._unwrapped_model
        names = kept_from_decay(model)
        model.no_weight_decay = lambda: names
        super().load_optimizer()

    def _sample(self) -> list[Any]:
        """Some structures from all over the train set.

        Raises:
            ValueError: one of them lacks a target.
        """
        places = _places(self.train_dataset)
        sample = [self.train_dataset[place] for place in places]
        old_names = dict([keys.ENERGY_ALIASES, keys.FORCES_ALIASES])
        for place, data in zip(places, sample, strict=True):
            for target, settings in self.output_targets.items():
                if target not in data and "decomposition" not in settings:
                    old = old_names.get(target)
                    hint = f" Set 'dataset.train.key_mapping: {{{old}: {target}}}'." if old in data else ""
                    raise ValueError(
                        f"Structure {place} of 'dataset.train.src' has no '{target}', which 'outputs' "
                        f"names (it has: {', '.join(sorted(data.keys()))}).{hint}"
                    )
        return sample

    def _say_what_will_happen(self) -> None:
        lines = summary.describe_run(
            self.corruption,
            self.noise_loss,
            batch_size=self.config["optim"].get("batch_size", 1),
            num_ranks=distutils.get_world_size(),
        )
        for line in lines:
            logging.info(line)
        for warning in config.unread_settings(self.config["optim"]):
            logging.warning(warning)
        sample = self._sample()
        if self.fine_tuning is None:
            self._check_sample(sample)

    def _fine_tune(self, start: FineTuning) -> None:
        super()._fine_tune(start)
        if distutils.is_master():
            self._check_sample(self._sample())

    def _use_normalizers_of(self, checkpoint: dict[str, Any], file: str) -> None:
        super()._use_normalizers_of(checkpoint, file)
        self._reference_guards.clear()
        self._guard_references(dict.fromkeys(self.elementrefs, f"the checkpoint '{file}'"))

    def _check_sample(self, sample: list[Any]) -> None:
        """Refuse elements without references; warn of targets that the normalisers were not made for."""
        self._check_elements("train", sample)
        for split in ("val", "test"):
            if self._reference_guards and (dataset := getattr(self, f"{split}_dataset")) is not None:
                self._check_elements(split, [dataset[place] for place in _places(dataset)])
        references = self.elementrefs.get(keys.ENERGY)
        seen = summary.sample_targets(
            sample, references.element_references if references is not None else None
        )
        for name, target in seen.items():
            if name in self.normalizers:
                normalizer = self.normalizers[name]
                for warning in summary.target_warnings(
                    name, target, normalizer.mean.item(), normalizer.rmsd.item()
                ):
                    logging.warning(warning)

    def _check_elements(self, split: str, structures: Iterable[Any]) -> None:
        for guard in self._reference_guards.values():
            for data in structures:
                guard.check(data, f"'dataset.{split}.src'")

    # ------------------------------------------------------------------ a step

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        training = self.model.training
        if training and self.corruption is not None and self.corruption.switch == "batch":
            self._toss_coin_of_batch(batch)
        check_atomic_numbers(batch, getattr(self._unwrapped_model, "max_num_elements", 1 << 30))
        if getattr(self._unwrapped_model, "use_pbc", False) and keys.CELL in batch:
            check_cells(batch)
        for guard in self._reference_guards.values():
            guard.check(batch)
        if training and (graphed := self._graphed_for(batch)) is not None:
            self._on_host(batch)
            with self._seeded():
                return graphed.forward(batch)
        raw: dict[str, Tensor] = {}
        watch = self.model.register_forward_hook(lambda _module, _inputs, outputs: raw.update(outputs))
        try:
            outputs = super()._forward(batch)
        finally:
            watch.remove()
        if keys.NOISE in raw:
            outputs |= single({keys.NOISE: raw[keys.NOISE]})
        return outputs

    def _graphed_for(self, batch: Any) -> GraphedSteps | None:
        """What carries out this step, if that is to be a CUDA graph."""
        if self._steps_graphed is None:
            self._steps_graphed = is_wanted(self)
        if not self._steps_graphed:
            return None
        if not self._unwrapped_model.has_static_shapes(batch):
            self._graphed_step = None
            return None
        if self._graphed is None:
            self._graphed = GraphedSteps(self)
        self._graphed_step = self._graphed
        return self._graphed

    def _toss_coin_of_batch(self, batch: Any) -> None:
        assert self.corruption is not None
        if not batch_is_corrupted(self.corruption, seed=self.seed, step=self.step):
            return
        epoch = self.train_sampler.sampler.epoch
        noisy = corrupt(batch, self.corruption, seed=self.seed, epoch=epoch, selected=True)
        for key in (keys.POS, *keys.DENS_FIELDS):
            batch[key] = noisy[key]

    def _loss(self, out: Mapping[str, Tensor], batch: Any) -> Tensor:
        if self.model.training and self._graphed_step is not None:
            return self._graphed_step.loss
        if self.corruption is None or keys.NOISE_MASK not in batch:
            return super()._loss(out, batch)
        _require_noise(out, self._unwrapped_model)
        others = [target for target, _ in self.loss_functions if target != keys.FORCES]
        loss = self._force_and_noise_loss(out, batch)
        return loss + self._sum_of_losses(out, batch, others) if others else loss

    def _force_and_noise_loss(self, out: Mapping[str, Tensor], batch: Any) -> Tensor:
        assert self.corruption is not None and self.noise_loss is not None
        forces = dict(self.loss_functions)[keys.FORCES]
        force_target = self._normalized(keys.FORCES, batch[keys.FORCES], batch)
        noise_target = batch[keys.NOISE_VEC] / self.corruption.noise_scale
        natoms, filled_in = batch[keys.NATOMS], self._filled_in_coefficient
        return objective.force_and_noise_loss(
            objective.per_atom(forces["fn"].loss_fn(out[keys.FORCES], force_target, natoms)),
            objective.per_atom(self._noise_error(out[keys.NOISE], noise_target, natoms)),
            self._atoms(batch, "train_on_free_atoms"),
            force_coefficient=forces["coefficient"],
            noise_coefficient=self._noise_coefficient if filled_in is None else filled_in,
            reduction=self.noise_loss.reduction,
            sum_over_ranks=self._sum_over_ranks,
            num_ranks=distutils.get_world_size(),
        )

    @property
    def _noise_coefficient(self) -> float:
        """λ_N in the epoch of the step."""
        assert self.noise_loss is not None
        epoch = (self.step - 1) // len(self.train_loader)
        return self.noise_loss.coefficient_at(epoch, self.config["optim"]["max_epochs"])

    def _backward(self, loss: Tensor) -> None:
        if self._graphed_step is None:
            super()._backward(loss)
            return
        with self._graphed_step.updated() as known:
            super()._backward(known)

    def _atoms(self, batch: Any, rule: str) -> objective.SupervisedAtoms:
        assert self.corruption is not None
        return objective.supervised_atoms(
            batch[keys.NOISE_MASK],
            batch[keys.FIXED],
            free_atoms_only=self.output_targets[keys.FORCES].get(rule, True),
            all_atoms=self.corruption.all_atoms,
        )

    # ------------------------------------------------------------------ metrics

    def _counted(self, batch: Any) -> Tensor:
        """Structures that were not corrupted; the others have metrics of their own."""
        counted = super()._counted(batch)
        return counted & ~batch[keys.CORRUPTED] if keys.CORRUPTED in batch else counted

    def _measure(self, out: Mapping[str, Tensor], batch: Any, evaluator: Any) -> dict[str, Mean]:
        means = super()._measure(out, batch, evaluator)
        if self.corruption is None or keys.CORRUPTED not in batch:
            return means
        _require_noise(out, self._unwrapped_model)

        def physical(target: str) -> Tensor:
            return self._denorm_preds(target, out[target].detach(), self._sized(batch))

        corrupted = batch[keys.CORRUPTED]
        return means | objective.denoising_metrics(
            energy=(physical(keys.ENERGY), batch[keys.ENERGY]),
            forces=(physical(keys.FORCES), batch[keys.FORCES]),
            noise=(out[keys.NOISE].detach() * self.corruption.noise_scale, batch[keys.NOISE_VEC]),
            atoms=self._atoms(batch, "eval_on_free_atoms"),
            corrupted=corrupted,
            batch=batch[keys.BATCH],
        )

    def _measure_for_print(self, out: Mapping[str, Tensor], batch: Any) -> dict[str, Mean]:
        means = super()._measure_for_print(out, batch)
        if self.corruption is None or keys.CORRUPTED not in batch:
            return means
        corrupted = batch[keys.CORRUPTED]
        on_atoms = corrupted[batch[keys.BATCH]]
        sigmas = torch.where(on_atoms, batch[keys.SIGMAS].reshape(-1), 0.0)
        structures = torch.ones_like(corrupted, dtype=torch.float64).sum()
        return means | {
            "noise_std_A": Mean(sigmas.sum(), on_atoms.sum()),
            "corrupted_share": Mean(corrupted.sum(), structures),
        }

    def _printed(self, means: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        printed = super()._printed(means)
        if self.corruption is not None:
            printed["noise_prob"] = {"metric": self.corruption.prob}
            printed["noise_coefficient"] = {"metric": self._noise_coefficient}
        return printed


def _without_fine_tuning(model: Mapping[str, Any]) -> tuple[FineTuning | None, dict[str, Any]]:
    """Take ``finetune_config`` out of the settings of a model, except where fairchem reads it."""
    if not model.get(FINE_TUNING):
        return None, dict(model)
    if model.get("name") == "hydra":
        if "normalizers" in model[FINE_TUNING]:
            raise ValueError(
                f"'model.{FINE_TUNING}.normalizers' is not for 'hydra' models: those fairchem itself "
                "fine-tunes, with the normalisers of the data. Remove it."
            )
        return None, dict(model)
    rest = {key: value for key, value in model.items() if key != FINE_TUNING}
    return FineTuning.from_config(model[FINE_TUNING]), rest


def _register(_worker: int = 0) -> None:
    importlib.import_module("fairchem_dens.register")


def _innermost(dataset: Any) -> Any:
    """The data set itself, without those that choose from it."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _places(dataset: Any) -> list[int]:
    """Some indices from all over a data set."""
    count = min(_NUM_SAMPLED, len(dataset))
    return torch.linspace(0, len(dataset) - 1, count).long().tolist()  # type: ignore[no-any-return]


def _require_noise(out: Mapping[str, Tensor], model: Any) -> None:
    if keys.NOISE not in out:
        raise ValueError(
            f"The model {type(model).__name__} does not predict noise, so it cannot be trained with DeNS. "
            "Choose a force-conditioned model ('model.name: fairchem_dens.models.EquiformerV2DeNS', or "
            "ESCNDeNS or EquiformerDeNS), or remove 'dens' and the loss on noise."
        )
