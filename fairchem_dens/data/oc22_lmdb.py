"""OC22, and OC22 together with OC20 on total energies: fairchem's ``oc22_lmdb`` format.

OC22 stores total energies, OC20 energies of adsorption. With ``train_on_oc20_total_energies: True`` the
energy that OC20 left out, from the file that ``oc20_ref`` names, is added to structures of OC20, which are
those without the field ``oc22``. Files of both kinds may lie in one folder and share batches.

As in fairchem-core 1.10.0, this is about the names that both sets were published with: energies under ``y``
or ``y_relaxed`` (one under ``energy`` is taken as it is), systems of OC20 with numbers as ``sid``. A run
reads one folder for a split, so the share of each set is that of its files. Energies relative to the elements
are not made here but by fairchem's transform ``element_references``, for both sets alike.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fairchem.core.datasets.oc22_lmdb_dataset import OC22LmdbDataset

from fairchem_dens import keys
from fairchem_dens.data.reader import LmdbReader
from fairchem_dens.data.records import Fields

_ENERGIES = ("y_relaxed", "y")
_RELAXATION_ONLY = ("force", "y_init")
_DATA_TO_TRAIN = ("all", "adslabs", "slabs")


class LazyOC22LmdbDataset(LmdbReader, OC22LmdbDataset):
    """In place of fairchem's ``oc22_lmdb``: see `LmdbReader`.

    Structures of OC20 also get ``nads`` 1 and ``oc22`` 0. Stored edges are always left out, as those of OC20
    and OC22 do not go together.

    Args:
        config: settings of `LmdbReader`, and fairchem's ``train_on_oc20_total_energies``, ``oc20_ref`` (a
            pickled dictionary from ``random<sid>`` to eV; read when the first structure of OC20 is met, from
            a file whose origin you trust) and ``data2train`` (``all``, or by the word ``clean`` in the lines
            of the ``*.txt`` files beside the LMDBs ``slabs`` or ``adslabs``).

    Raises:
        FileNotFoundError: as `LmdbReader`; on access, ``oc20_ref`` does not exist.
        ValueError: as `LmdbReader`, or ``data2train`` is not known or its files do not fit; on access, an
            energy of OC20 cannot be made a total energy.
    """

    # As fairchem counts here: all keys but `length`, whatever that says.
    trust_length = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.train_on_oc20_total_energies = bool(config.get("train_on_oc20_total_energies", False))
        super().__init__({**config, "keep_graph": False})

    def _choose(self) -> Sequence[int]:
        wanted = self.config.get("data2train", "all")
        if wanted not in _DATA_TO_TRAIN:
            raise ValueError(
                f"'dataset.*.data2train' must be one of {', '.join(_DATA_TO_TRAIN)}, found {wanted!r}."
            )
        self.data2train = wanted
        if wanted == "all":
            return super()._choose()
        lines: list[str] = []
        for file in sorted(self.path.glob("*.txt")):
            lines += file.read_text(encoding="utf-8").splitlines()
        if len(lines) != len(self.files):
            raise ValueError(
                f"'dataset.*.data2train: {wanted}' needs one line for each structure in the *.txt files of "
                f"'{self.path}': found {len(lines)} for {len(self.files)}."
            )
        return [place for place, line in enumerate(lines) if ("clean" in line) == (wanted == "slabs")]

    def _fields(self, file: int, record: int) -> Fields:
        fields = super()._fields(file, record)
        energy = next((name for name in _ENERGIES if name in fields), None)
        if energy is None or "oc22" in fields:  # without an energy it is test data
            return fields
        if not self.train_on_oc20_total_energies:
            raise self.files.error(
                file,
                record,
                "has no field 'oc22', so it is of OC20 and its energy one of adsorption. Set 'dataset.*."
                "train_on_oc20_total_energies: True' and 'dataset.*.oc20_ref' to train on both; for OC20 "
                "alone, set 'format: lmdb'.",
                fields,
            )
        fields[energy] += self._left_out_by_oc20(file, record, fields)
        fields |= {"nads": 1, "oc22": 0}
        if energy == "y_relaxed":
            for name in _RELAXATION_ONLY:
                fields.pop(name, None)
        return fields

    def _left_out_by_oc20(self, file: int, record: int, fields: Fields) -> float:
        path = self.config.get("oc20_ref")
        if not path:
            raise ValueError(
                "'dataset.*.train_on_oc20_total_energies' is True but 'dataset.*.oc20_ref' is missing: set "
                "it to OC20's file of reference energies (oc20_ref.pkl)."
            )
        system = f"random{fields.get(keys.SID)}"
        energies = _references(str(path))
        if system not in energies:
            raise self.files.error(
                file,
                record,
                f"is of the system '{system}', which 'dataset.*.oc20_ref' ('{path}') has no energy for. "
                "Remove the structure, or use the file that belongs to the data.",
                fields,
            )
        return float(energies[system])


@lru_cache(maxsize=2)
def _references(path: str) -> Mapping[str, Any]:
    """The file of reference energies, read once in each process."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"'dataset.*.oc20_ref' is '{path}', which does not exist. Set it to OC20's file of reference "
            "energies (oc20_ref.pkl)."
        )
    try:
        with Path(path).open("rb") as file:
            energies = pickle.load(file)
        return {str(system): float(energy) for system, energy in energies.items()}
    except Exception as error:
        raise ValueError(
            f"'dataset.*.oc20_ref' is '{path}', which is no pickled dictionary from system to energy "
            f"({error})."
        ) from error
