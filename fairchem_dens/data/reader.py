"""fairchem's ``lmdb`` data set for files as they are in the wild, and for loader workers of any kind.

`DeNSTrainer` reads the formats of fairchem's class with it; other trainers and scripts get fairchem's own,
unless they ask for ``format: fairchem_dens.data.reader.LazyLmdbDataset``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fairchem.core.datasets._utils import rename_data_object_keys
from fairchem.core.datasets.base_dataset import BaseDataset
from fairchem.core.datasets.lmdb_dataset import LmdbDataset
from fairchem.core.modules.transforms import DataTransforms
from torch_geometric.data import Data

from fairchem_dens.config import dens_name
from fairchem_dens.data.lmdb import METADATA_FILE, lmdb_files
from fairchem_dens.data.records import (
    GRAPH_FIELDS,
    BadRecord,
    Fields,
    Layout,
    RecordFiles,
    as_data,
    tidy,
)
from fairchem_dens.data.skipping import SkippedRecords
from fairchem_dens.errors import UnreadableRecord
from fairchem_dens.transforms import dens

_READ_BY_TRAINERS = ("normalizer", "element_references")
"""What stands among the transforms and is none."""
_MOST_IN_A_ROW = 1000
"""Bad records one behind the other; more are no accident."""


class LmdbReader(BaseDataset):
    """What all data sets on LMDB files share: lazy files, one form for all records, clear errors.

    A subclass names the fairchem class whose place it takes as its second base.

    Args:
        config: fairchem's settings (``src`` is a folder of LMDBs or one file; ``shard`` and ``total_shards``;
            ``metadata_path``, ``max_atoms``, ``subset_to``, ``key_mapping``, ``transforms``),
            ``keep_graph``: False leaves out stored edges (default True), and ``skip_bad_records``: True puts
            the next readable structure in the place of one that cannot be read (default False).

    Raises:
        FileNotFoundError: ``src`` does not exist, or is a folder without LMDBs.
        ValueError: a setting is impossible, a file cannot be read, or the files do not belong together. On
            access, a structure is missing, damaged or has labels that are not finite; names file and record.
    """

    path: Path
    transforms: DataTransforms

    trust_length = True
    """Whether the number of records is what the file says it is, where it says so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.path = _src(config)
        ours = {**config, "src": str(self.path)}
        if ours.pop("lin_ref", None):
            logging.warning(
                "'dataset.*.lin_ref' does nothing in fairchem-core 1.10.0: set 'dataset.train.transforms."
                "element_references: {energy: {file: ...}}'."
            )
        BaseDataset.__init__(self, ours)
        self.files = RecordFiles(lmdb_files(self.path), trust_length=self.trust_length)
        self._chosen: Sequence[int] = self._choose()
        self.num_samples = len(self._chosen)
        self.key_mapping = config.get("key_mapping")
        self.transforms = _Transforms(config.get("transforms") or {})
        if config.get("max_atoms") is not None or config.get("subset_to"):
            self._require_metadata()
        self.skip_bad_records = config.get("skip_bad_records", False)
        if not isinstance(self.skip_bad_records, bool):
            raise ValueError(
                f"'dataset.*.skip_bad_records' must be True or False, found {self.skip_bad_records!r}."
            )
        self.skipped = SkippedRecords()
        self.layout = self._layout()
        self.files.close()

    def __getitem__(self, index: int) -> Data:
        place = self._chosen[index]
        if self.skip_bad_records:
            data = self._next_readable(index if index >= 0 else index + len(self._chosen))
        else:
            data = self._structure(*self.files.locate(place))
        data = self.transforms(data)
        if self.key_mapping is not None:
            data = rename_data_object_keys(data, self.key_mapping)
        return data

    def close_db(self) -> None:
        """Let go of all files. The next use opens them again."""
        self.files.close()

    def __del__(self) -> None:
        """Do nothing: handles close by themselves, and fairchem's version fails where construction failed."""

    # ------------------------------------------------------------------ for subclasses

    def _choose(self) -> Sequence[int]:
        """Return the places, in all files together, of the structures that belong to this data set."""
        total = len(self.files)
        self.sharded = "shard" in self.config and "total_shards" in self.config
        if not self.sharded:
            return range(total)
        shard, shards = self.config["shard"], self.config["total_shards"]
        if not 0 <= shard < shards:
            raise ValueError(
                f"'dataset.*.shard' must be from 0 to {shards - 1} ('total_shards' is {shards}), found "
                f"{shard}."
            )
        size, longer = divmod(total, shards)
        start = shard * size + min(shard, longer)
        chosen = range(start, start + size + (shard < longer))
        if not chosen:
            raise ValueError(
                f"'dataset.*.total_shards' is {shards}, but '{self.path}' holds only {total} structures."
            )
        return chosen

    def _fields(self, file: int, record: int) -> Fields:
        """Return the fields of a record, each in its one form."""
        fields = self.files.read(file, record)
        try:
            tidy(fields)
        except BadRecord as problem:
            raise self.files.error(file, record, str(problem), fields) from None
        return fields

    # ------------------------------------------------------------------

    def _structure(self, file: int, record: int) -> Data:
        fields = self._fields(file, record)
        try:
            self.layout.apply(fields)
        except BadRecord as problem:
            raise self.files.error(file, record, str(problem), fields) from None
        fields["id"] = f"{file}_{record}"
        return as_data(fields)

    def _next_readable(self, index: int) -> Data:
        """Return a structure, or the first one behind it that can be read: the same one at any time.

        Raises:
            UnreadableRecord: so many in a row cannot be read that something else must be wrong.
        """
        for behind in range(_MOST_IN_A_ROW):
            try:
                return self._structure(*self.files.locate(self._chosen[(index + behind) % len(self._chosen)]))
            except UnreadableRecord as record:
                self.skipped.note(record)
                last = record
        raise UnreadableRecord(
            f"{_MOST_IN_A_ROW} records in a row cannot be read, so 'dataset.train.skip_bad_records' does not "
            f"help. The last one: {last}",
            last.place,
            last.problem,
        )

    def _first_fields(self, file: int, count: int) -> Fields:
        """Return the fields of the first structure of a file, or of the first readable one."""
        for record in range(min(count, _MOST_IN_A_ROW) if self.skip_bad_records else 0):
            with contextlib.suppress(UnreadableRecord):
                return self._fields(file, record)
        return self._fields(file, 0)

    def _layout(self) -> Layout:
        """Look at the first record of each file."""
        firsts = {
            env.path: self._first_fields(file, count)
            for file, (env, count) in enumerate(zip(self.files.envs, self.files.counts, strict=True))
            if count
        }
        leave_out = () if self.config.get("keep_graph", True) else GRAPH_FIELDS
        layout = Layout(firsts, key_mapping=self.key_mapping, leave_out=leave_out)
        if layout.left_out:
            logging.warning(
                f"Only some files of '{self.path}' have the fields {', '.join(layout.left_out)}: they are "
                "left out."
            )
        return layout

    # ------------------------------------------------------------------ metadata

    @property
    def _metadata_file(self) -> Path:
        given = self.config.get("metadata_path")
        folder = self.path.parent if self.path.is_file() else self.path
        return Path(given) if given else folder / METADATA_FILE

    def _require_metadata(self) -> None:
        if not self._metadata_file.is_file():
            key = "max_atoms" if self.config.get("max_atoms") is not None else "subset_to"
            raise ValueError(
                f"'dataset.*.{key}' needs '{self._metadata_file}', which does not exist: `fairchem-dens data "
                "check` writes it."
            )

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        file = self._metadata_file
        if not file.is_file():
            logging.warning(f"There is no '{file}', so batches of several ranks are not balanced by atoms.")
            return {}
        try:
            with np.load(file, allow_pickle=True) as stored:
                metadata = {name: stored[name] for name in stored.files}
            natoms = metadata["natoms"]
        except Exception as error:
            raise ValueError(
                f"'{file}' is not an .npz file with 'natoms' ({error}): remove it, and let `fairchem-dens "
                "data check` write it anew."
            ) from error
        for name, values in metadata.items():
            if len(values) != len(self.files):
                raise ValueError(
                    f"'{file}' has '{name}' of {len(values)} structures and '{self.path}' holds "
                    f"{len(self.files)}: remove it, and let `fairchem-dens data check` write it anew."
                )
        if not np.issubdtype(natoms.dtype, np.integer):
            raise ValueError(f"'{file}' has 'natoms' of type {natoms.dtype}, which must be whole numbers.")
        chosen = np.asarray(self._chosen)
        return {name: values[chosen] for name, values in metadata.items()}


class _Transforms(DataTransforms):
    """fairchem's transforms, whose names it compiles for each structure; `dens` alone needs none of that."""

    def __call__(self, data: Data) -> Data:
        name = dens_name(self.config)
        if name is not None and not self.config.keys() - {name, *_READ_BY_TRAINERS}:
            return dens(data, self.config[name])
        return super().__call__(data)


class LazyLmdbDataset(LmdbReader, LmdbDataset):
    """In place of fairchem's ``lmdb``, ``single_point_lmdb`` and ``trajectory_lmdb``: see `LmdbReader`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("train_on_oc20_total_energies"):
            raise ValueError("'dataset.*.train_on_oc20_total_energies' needs 'dataset.*.format: oc22_lmdb'.")
        super().__init__(config)


READERS = {
    **dict.fromkeys(
        ("lmdb", "single_point_lmdb", "trajectory_lmdb"), "fairchem_dens.data.reader.LazyLmdbDataset"
    ),
    "oc22_lmdb": "fairchem_dens.data.oc22_lmdb.LazyOC22LmdbDataset",
}
"""fairchem's formats on LMDB files, and the classes that `DeNSTrainer` reads them with."""


def with_our_readers(splits: Mapping[str, dict[str, Any]], *, keep_graph: bool) -> dict[str, dict[str, Any]]:
    """Return the settings of all splits with fairchem's formats on LMDB files replaced by the classes here.

    Args:
        splits: fairchem's settings by split; all but ``train`` inherit from it unless they say otherwise.
        keep_graph: whether anybody reads edges that are stored.

    Raises:
        ValueError: bad records are to be skipped where that is not possible, or would change what is
            measured.
    """
    replaced = {}
    for name, settings in splits.items():
        inherited = splits["train"] if settings.get("use_train_settings", True) else {}
        written = settings.get("format", inherited.get("format", "lmdb"))
        replaced[name] = settings
        skip = settings.get("skip_bad_records", False)
        if name != "train" and skip:
            raise ValueError(
                f"'dataset.{name}.skip_bad_records' would evaluate other structures than those of the data "
                "set: repair or remove the bad records. It is for 'dataset.train' only."
            )
        if skip and written not in (*READERS, "dens_lmdb"):
            raise ValueError(
                f"'dataset.{name}.skip_bad_records' is for LMDB files, not for the format '{written}': "
                "remove it."
            )
        if settings and written in (*READERS, "dens_lmdb"):
            # The other splits inherit what they do not say themselves.
            own = {} if name == "train" else {"skip_bad_records": False}
            reader = {"format": READERS.get(written, written)}
            replaced[name] = {"keep_graph": keep_graph, **settings, **reader, **own}
    return replaced


def _src(config: Mapping[str, Any]) -> Path:
    where = "'dataset.*.src'"
    src = config.get("src")
    if isinstance(src, list | tuple) and len(src) == 1:
        (src,) = src
    if not isinstance(src, str | os.PathLike) or not str(src):
        raise ValueError(f"{where} must be the path of a folder of LMDBs or of one LMDB file, found {src!r}.")
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(
            f"{where} is '{src}', which does not exist. Set it to your folder of *.lmdb files."
        )
    if path.is_dir() and not any(path.glob("*.lmdb")):
        raise FileNotFoundError(
            f"{where} is '{src}', a folder without any *.lmdb file. Set it to the folder that holds them."
        )
    return path
