"""Fine-tuning: a run that takes its first weights from a checkpoint and nothing else of its run.

A checkpoint starts a run in one of three ways:

- *resume*: ``fairchem --mode train --checkpoint FILE``. Weights, step, optimizer, schedule, moving average,
  normalisers: the run goes on bit for bit. Only a file that a run wrote with its state can be resumed.
- *fine-tune*: the YAML names the file. Step 0, and a fresh optimizer, schedule and moving average::

      model:
        name: fairchem_dens.models.EquiformerV2DeNS
        finetune_config:
          starting_checkpoint: imported.pt
          normalizers: checkpoint   # or: data
        ...

  ``normalizers: checkpoint`` keeps normalisers and element references of the file, whatever the data settings
  say; ``data`` takes those of ``dataset.train.transforms``. It has to be said: predictions change scale with
  them. The key is fairchem's, which knows it for ``hydra`` models; those it fine-tunes by itself.
- *inference*: ``--mode validate|predict|run-relaxations --checkpoint FILE``, or fairchem's calculator.

For fine-tuning, and wherever a model is built for inference alone, the weights are the moving average, where
the file has one. A fine-tuned checkpoint does not need the file that it started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairchem_dens.config import expanded
from fairchem_dens.validation import refuse_unknown_keys, require_mapping

KEY = "finetune_config"
WHERE = f"model.{KEY}"

CHECKPOINT, DATA = "checkpoint", "data"


@dataclass(frozen=True)
class FineTuning:
    """What ``model.finetune_config`` says.

    Attributes:
        starting_checkpoint: the file.
        normalizers: ``checkpoint`` or ``data``, where normalisers and element references come from.
    """

    starting_checkpoint: str
    normalizers: str

    @classmethod
    def from_config(cls, settings: Any) -> FineTuning:
        """Read the YAML mapping; variables and ``~`` in the path are expanded.

        Raises:
            ValueError: a setting is unknown, missing or has another value; names its YAML key.
        """
        settings = expanded(require_mapping(settings, WHERE), WHERE)
        refuse_unknown_keys(settings, ("starting_checkpoint", "normalizers"), WHERE)
        file, normalizers = settings.get("starting_checkpoint"), settings.get("normalizers")
        if not isinstance(file, str) or not file:
            raise ValueError(f"'{WHERE}.starting_checkpoint' must name a checkpoint, found {file!r}.")
        if normalizers not in (CHECKPOINT, DATA):
            raise ValueError(
                f"'{WHERE}.normalizers' must be '{CHECKPOINT}' (keep normalisers and element references of "
                f"'{file}') or '{DATA}' (take those of 'dataset.train.transforms'), found {normalizers!r}."
            )
        return cls(file, normalizers)

    def check_normalizers(self, of_checkpoint: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Refuse a choice that leaves a target without the normaliser that the weights were trained with.

        Args:
            of_checkpoint: by target.
            of_data: by target.

        Raises:
            ValueError: there is none where they are to come from.
        """
        if self.normalizers == CHECKPOINT and not of_checkpoint:
            raise ValueError(
                f"'{WHERE}.normalizers' is '{CHECKPOINT}', but '{self.starting_checkpoint}' holds none: "
                f"write them under 'dataset.train.transforms.normalizer' and set '{DATA}'."
            )
        missing = [target for target in of_checkpoint if target not in of_data]
        if self.normalizers == DATA and missing:
            raise ValueError(
                f"'{WHERE}.normalizers' is '{DATA}', but 'dataset.train.transforms.normalizer' has none for "
                f"'{missing[0]}', which '{self.starting_checkpoint}' was trained to predict normalised: "
                f"write it there, or set '{CHECKPOINT}'."
            )
