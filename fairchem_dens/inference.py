"""Run a checkpoint on data: the one way in which the commands of this package do it.

The predictions are those of fairchem's own trainer, in the order of the data. On a CPU, two runs give the
same bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairchem.core.common.utils import setup_imports
from torch.utils.data import Dataset

from fairchem_dens import checkpoints, keys
from fairchem_dens.progress import progress_bar
from fairchem_dens.trainer import DeNSTrainer

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from torch_geometric.data import Batch

Source = str | Path | Mapping[str, Any]
"""Data: the path of LMDBs, or the settings of a split as a YAML has them."""

_IN_CHECKPOINT = ("normalizer", "element_references")
"""Transforms of a run that are files or fits; a checkpoint holds what came of them."""
_NOT_INHERITED = (
    *("first_n", "sample_n", "max_atoms", "subset_to", "shard", "total_shards"),
    *("metadata_path", "train_split_settings", "splits"),
)
"""Settings of a train split that choose among its structures or describe them: nobody else's."""
_OWN_ORDER = ("first_n", "sample_n")
"""Settings beside which fairchem allows no ``no_shuffle``; all other data it would shuffle."""
_NEEDED = ("task", "outputs", "optim", "loss_functions", "evaluation_metrics")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says about one structure, and its labels where the data has them.

    Attributes:
        sid, fid: ids of system and frame; None where the data has none.
        fixed: (N,) bool, True where the atom is held fixed.
        energy: in the unit of the data.
        forces: (N, 3) float32, of all atoms, in the unit of the data per Å.
        true_energy: label, or None.
        true_forces: (N, 3) float32, labels, or None.
    """

    sid: str | None
    fid: str | None
    fixed: np.ndarray
    energy: float
    forces: np.ndarray
    true_energy: float | None
    true_forces: np.ndarray | None

    @property
    def natoms(self) -> int:
        """Number of atoms."""
        return len(self.fixed)

    @property
    def id(self) -> str:
        """``sid_fid`` as in fairchem's files of predictions, or ``sid`` where there is no ``fid``."""
        return f"{self.sid}" if self.fid is None else f"{self.sid}_{self.fid}"


def trainer_of(
    checkpoint: str | Path,
    *,
    dataset: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    cpu: bool | None = None,
    amp: bool = False,
) -> DeNSTrainer:
    """Build a trainer from a checkpoint, to predict with.

    Its weights are the moving average where the file has one; normalisers and references are those of the
    file. Nothing is written to disk. ``trainer.predict`` writes its results below
    ``trainer.config["cmd"]["results_dir"]`` if it is given the name of a file, and that folder has to exist.

    Args:
        checkpoint: the file.
        dataset: settings by split (``val``, ``test``, ``relax``), as in a YAML, which are opened: the trainer
            then has ``val_loader`` and so on. Settings under ``train``, which the other splits inherit,
            replace those in the file; its data is not opened. None opens nothing: see `loader_of` and
            `predictions`.
        batch_size: structures in a batch; None takes that of evaluations in the file.
        num_workers: processes that read data; 0 reads in this one.
        cpu: whether to use no GPU; None uses one if there is one.
        amp: whether to use mixed precision on a GPU.

    Raises:
        FileNotFoundError: the file, or data in ``dataset``, does not exist.
        ValueError: the file is damaged, newer than this package, of another layout, or does not fit its own
            configuration; a setting is impossible.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"'{name}' must be at least {least}, found {value}.")
    setup_imports()
    loaded = checkpoints.read(checkpoint)
    settings = _settings(loaded, str(checkpoint))
    optim = {**settings["optim"], "num_workers": num_workers}
    if batch_size is not None:
        optim["eval_batch_size"] = batch_size
    others = dict(dataset or {})
    train = _without_fits({**settings["dataset"], **others.pop("train", {})})
    others = {name: _in_order(train, split) for name, split in others.items()}
    trainer = DeNSTrainer(
        **{name: settings[name] for name in _NEEDED if name != "optim"},
        model=settings["model"],
        optimizer=optim,
        dataset={**others, "train": train},
        identifier="",
        timestamp_id="inference",
        local_rank=0,
        # Without it fairchem makes folders and opens a logger; afterwards it would refuse to predict.
        is_debug=True,
        logger="none",
        seed=0,
        amp=amp,
        cpu=not torch.cuda.is_available() if cpu is None else cpu,
        inference_only=True,
    )
    trainer.is_debug = False
    trainer.load_checkpoint(str(checkpoint), loaded, inference_only=True)
    if others:
        trainer.load_datasets()
    return trainer


def splits_of(checkpoint: str | Path) -> dict[str, dict[str, Any]]:
    """Return the settings of the splits ``val`` and ``test`` that the run of a checkpoint had.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint that this version reads.
    """
    settings = checkpoints.read(checkpoint).get("config") or {}
    splits = {name: dict(settings.get(f"{name}_dataset") or {}) for name in ("val", "test")}
    for name, split in splits.items():
        split.update(split.pop(f"{name}_split_settings", None) or {})
    return {name: split for name, split in splits.items() if split.get("src")}


def loader_of(trainer: DeNSTrainer, src: Source) -> DataLoader[Any]:
    """Open data for a trainer; the batches come in the order of the data.

    It becomes the trainer's ``test`` split.

    Args:
        trainer: see `trainer_of`.
        src: a path, of which every structure is read; or settings as under ``dataset.test``, which inherit
            those of the train split.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: a setting or a record is wrong; names it.
    """
    train = trainer.config["dataset"]
    if not isinstance(src, Mapping):
        train = {name: value for name, value in train.items() if name not in _NOT_INHERITED}
        src = {"src": str(src)}
    trainer.config["test_dataset"] = _in_order(train, src)
    trainer.load_datasets()
    return trainer.test_loader  # type: ignore[no-any-return]  # fairchem does not annotate it


def predictions(
    trainer: DeNSTrainer,
    src: Source,
    *,
    progress: str,
    positions: Mapping[str, np.ndarray] | None = None,
) -> Generator[Prediction, None, None]:
    """Predict energy and forces of each structure, in the order of the data.

    Args:
        trainer: see `trainer_of`.
        src: see `loader_of`.
        progress: what the progress bar says; empty shows none.
        positions: (N, 3), Å, by sid: where the atoms are instead, such as after a relaxation.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: a setting or a record is wrong, the model does not predict both, or ``positions`` are not
            those of the structures.
    """
    loader = loader_of(trainer, src)
    if positions is not None:
        loader = trainer.get_dataloader(_Moved(trainer.test_dataset, positions), loader.batch_sampler)
    total = len(trainer.test_dataset)
    with progress_bar(total=total, shown=bool(progress), desc=progress, unit="structure") as bar:
        for batch in loader:
            predicted = predict_batch(trainer, batch)
            yield from predicted
            bar.update(len(predicted))


class _Moved(Dataset[Any]):
    """A data set with its atoms elsewhere."""

    def __init__(self, dataset: Any, positions: Mapping[str, np.ndarray]) -> None:
        self._dataset = dataset
        self._positions = positions

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        data = self._dataset[index]
        sid, shape = str(data[keys.SID]), tuple(data[keys.POS].shape)
        if sid not in self._positions:
            raise ValueError(f"There are no positions for the structure with sid {sid}.")
        pos = torch.as_tensor(np.asarray(self._positions[sid])).to(data[keys.POS])
        if tuple(pos.shape) != shape:
            raise ValueError(
                f"The positions for the structure with sid {sid} are of shape {tuple(pos.shape)}, its atoms' "
                f"are of shape {shape}."
            )
        data[keys.POS] = pos
        return data


def predict_batch(trainer: DeNSTrainer, batch: Batch) -> list[Prediction]:
    """Predict energy and forces of the structures of a batch, which is moved to the trainer's device.

    Raises:
        ValueError: the model does not predict both.
    """
    # Read while the batch is on the host: nothing has to come back but the predictions.
    sizes = batch[keys.NATOMS].tolist()
    splits = np.cumsum(sizes)[:-1]
    count = len(sizes)
    fixed = (
        batch[keys.FIXED].bool().cpu().numpy() if keys.FIXED in batch else np.zeros(sum(sizes), dtype=bool)
    )
    sids, fids = _ids(batch, keys.SID, count), _ids(batch, keys.FID, count)
    true_energies = batch[keys.ENERGY].reshape(-1).tolist() if keys.ENERGY in batch else [None] * count
    true_forces = (
        np.split(batch[keys.FORCES].float().cpu().numpy(), splits) if keys.FORCES in batch else [None] * count
    )

    outputs = trainer.predict(batch, per_image=False, disable_tqdm=True)
    for name in (keys.ENERGY, keys.FORCES):
        if name not in outputs:
            raise ValueError(
                f"The checkpoint predicts {', '.join(outputs) or 'nothing'} and no '{name}': both energy and "
                "forces are needed."
            )
    energies = outputs[keys.ENERGY].float().reshape(-1).tolist()
    forces = np.split(outputs[keys.FORCES].float().cpu().numpy(), splits)
    return [
        Prediction(
            sid=sid, fid=fid, fixed=is_fixed, energy=energy, forces=force, true_energy=true_energy,
            true_forces=true_force,
        )
        for sid, fid, is_fixed, energy, force, true_energy, true_force in zip(
            sids, fids, np.split(fixed, splits), energies, forces, true_energies, true_forces, strict=True
        )
    ]  # fmt: skip


def _ids(batch: Batch, name: str, count: int) -> list[str] | list[None]:
    if name not in batch:
        return [None] * count
    values = batch[name]
    return [str(value) for value in (values.tolist() if isinstance(values, torch.Tensor) else values)]


def _settings(loaded: Mapping[str, Any], file: str) -> dict[str, Any]:
    settings = copy.deepcopy(loaded.get("config") or {})
    if not isinstance(settings.get("model"), dict):
        raise ValueError(
            f"'{file}' does not say in 'config.model' which model its weights are for, as those of the "
            "authors' code: make `fairchem-dens checkpoint import` of it first."
        )
    missing = [name for name in _NEEDED if settings.get(name) is None]
    if missing:
        raise ValueError(
            f"'{file}' has no 'config.{missing[0]}', so it does not say how it was trained: make "
            "`fairchem-dens checkpoint import` of it first."
        )
    settings["dataset"] = settings.get("dataset") or {}
    # Nobody else's: the trainer would take it for the split `relax`.
    settings["task"].pop("relax_dataset", None)
    return settings


def _without_fits(train: Mapping[str, Any]) -> dict[str, Any]:
    transforms = train.get("transforms") or {}
    kept = {name: value for name, value in transforms.items() if name not in _IN_CHECKPOINT}
    return {**{name: value for name, value in train.items() if name != "src"}, "transforms": kept}


def _in_order(train: Mapping[str, Any], split: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a split with what it inherits, so that its structures keep their order."""
    settings = {**train, **split} if split.get("use_train_settings", True) else dict(split)
    if all(settings.get(name) is None for name in _OWN_ORDER):
        settings["no_shuffle"] = True
    return {**settings, "use_train_settings": False}
