"""What a command line names as data, opened the way training opens it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_config, setup_imports
from fairchem.core.datasets.lmdb_dataset import LmdbDataset
from fairchem.core.datasets.oc22_lmdb_dataset import OC22LmdbDataset

from fairchem_dens import config
from fairchem_dens.data.environment import LazyEnvironment
from fairchem_dens.data.labels import Labelling, labels_of
from fairchem_dens.data.reader import READERS
from fairchem_dens.validation import nearest

SPLITS = ("train", "val", "test")
_YAML_ENDINGS = (".yml", ".yaml")
_ONE_SET = ("first_n", "sample_n", "max_atoms", "subset_to")


@dataclass(frozen=True)
class Source:
    """A data set of one split.

    Attributes:
        name: as it was given.
        settings: of the data set, as fairchem's classes take them.
        files: its LMDB files in fairchem's order; empty for other formats.
        from_yaml: whether the settings are those of a run.
        reduced: settings by which training leaves structures out.
    """

    name: str
    settings: dict[str, Any]
    files: tuple[Path, ...]
    from_yaml: bool = False
    reduced: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """Name of the data set's class in fairchem's registry."""
        return self.settings.get("format", "lmdb")

    @property
    def labels(self) -> Labelling:
        """What is on record about its labels."""
        return labels_of(self.files[0]) if self.files else Labelling()

    @property
    def corrupted(self) -> bool:
        """Whether the settings ask for corruption of these structures."""
        return config.dens_name(self.settings.get("transforms")) is not None

    @property
    def metadata_file(self) -> Path | None:
        """Where fairchem looks for the number of atoms of each structure; None for other formats."""
        if self.settings.get("metadata_path"):
            return Path(self.settings["metadata_path"])
        return self.files[0].parent / "metadata.npz" if self.files else None


def find_source(src: str | Path, split: str = "train") -> Source:
    """Find what ``src`` names.

    Args:
        src: a folder of LMDBs, an LMDB file, or the YAML of a run.
        split: which split of the YAML.

    Raises:
        FileNotFoundError: there is nothing of that name, or no LMDB in it.
        ValueError: the YAML has no such split, or a format that does not exist.
    """
    path = Path(src)
    from_yaml = path.suffix in _YAML_ENDINGS
    if from_yaml:
        settings = split_settings(path, split)
        name = f"{src} ({split})"
    else:
        settings = {"format": "lmdb", "src": str(path)}
        name = str(src)
    reduced = tuple(key for key in _ONE_SET if settings.get(key) is not None)
    files: tuple[Path, ...] = ()
    if issubclass(dataset_class(settings.get("format", "lmdb")), LmdbDataset | OC22LmdbDataset):
        config.check_sources({split: settings})
        location = Path(settings["src"])
        files = (location,) if location.is_file() else tuple(sorted(location.glob("*.lmdb")))
        if not from_yaml and any(files[0].parent.glob("data_log.*.txt")):
            settings["format"] = "dens_lmdb"
    return Source(name, settings, files, from_yaml, reduced)


def split_settings(file: Path, split: str) -> dict[str, Any]:
    """Return the data settings of a split as a trainer would hand them to fairchem.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or the split has no ``src``.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}'.")
    try:
        loaded, _, clashes = load_config(file)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"'{file}' is not the YAML of a run: {error}") from error
    if clashes:
        raise ValueError(f"Files that '{file}' includes contradict each other in {clashes}.")
    dataset = config.tidied(config.with_relax_dataset(loaded.get("dataset") or {}, loaded.get("task")))
    _, dataset, _ = config.translate_authors_keys(loaded.get("optim"), dataset, loaded.get("loss_functions"))
    if isinstance(dataset, list):
        dataset = dict(zip(SPLITS, dataset, strict=False))
    elif "src" in dataset:
        dataset = {"train": dataset}
    train, own = dataset.get("train") or {}, dataset.get(split) or {}
    settings = {**train, **own} if own.get("use_train_settings", True) else dict(own)
    if not own.get("src"):
        given = [name for name in dataset if (dataset[name] or {}).get("src")]
        raise ValueError(
            f"'{file}' has no 'dataset.{split}.src' (it has one for: {', '.join(given) or 'no split'}). "
            "Choose with --split."
        )
    return settings


def dataset_class(name: str) -> Any:
    """Return the class that training opens a format with.

    Raises:
        ValueError: there is none of that name.
    """
    import fairchem_dens.register  # noqa: F401  # here, because it imports all that it registers

    setup_imports()
    try:
        return registry.get_dataset_class(READERS.get(name, name))
    except RuntimeError as error:
        near = nearest(name, registry.mapping["dataset_name_mapping"])
        raise ValueError(f"'dataset.*.format' is '{name}', which does not exist{near}.") from error


def file_lengths(source: Source) -> list[int | str]:
    """Return for each file the number of its records or, where it cannot be read, what is wrong with it."""
    trust = getattr(dataset_class(source.format), "trust_length", True)
    lengths: list[int | str] = []
    for file in source.files:
        environment = LazyEnvironment(file)
        try:
            lengths.append(environment.count(trust_length=trust))
        except ValueError as error:
            lengths.append(str(error))
        environment.close()
    return lengths


def open_part(settings: Mapping[str, Any], file: Path | None) -> Any:
    """Open one file of a source, or a source that is not made of LMDB files, as a data set of fairchem's."""
    return _opened(pickle.dumps({**settings, "src": str(file)} if file is not None else dict(settings)))


def forget_opened() -> None:
    """Close what `open_part` has kept open."""
    _opened.cache_clear()


@lru_cache(maxsize=1)
def _opened(pickled_settings: bytes) -> Any:
    settings = pickle.loads(pickled_settings)
    return dataset_class(settings.get("format", "lmdb"))(settings)
