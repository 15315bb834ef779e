"""Write ``docs/configuration.md`` from the settings that the package validates.

    python docs/generate_configuration.py

Descriptions come from the docstrings, defaults from the code: a test compares the page with both.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairchem_dens import config
from fairchem_dens.checkpoints.fine_tuning import FineTuning
from fairchem_dens.corruption import Corruption
from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS, ESCNDeNS
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.training.settings import StepSettings

PAGE = Path(__file__).parent / "configuration.md"
_HEAD = """\
# Configuration reference

<!-- Written by docs/generate_configuration.py from the code. Change docstrings, not this page. -->

A run is one YAML of fairchem. DeNS adds a trainer, one transform, one loss and the model's name:

```yaml
trainer: fairchem_dens.trainer.DeNSTrainer       # or by its short name: dens
dataset:
  train:
    transforms:
      dens:                   # does something in this trainer and on the train split only
        prob: 0.5             # probability p that a structure is corrupted
        std: 0.1              # σ of the noise, Å; or std_low, std_high and num_steps for multi-scale noise
        corrupt_ratio: 0.5    # probability that an atom of it is displaced; null displaces all
        # all_atoms: False    # True displaces fixed atoms too
        # switch: structure   # a coin for each structure; `batch`: one for a batch, as the paper on OC20/OC22
        # strict_max_ratio:   # leave a structure alone if a larger share of its atoms was chosen (off)
        # max_force_norm:     # leave a structure alone if one of its forces is larger (off)
loss_functions:
  - energy: {fn: mae, coefficient: 2}
  - forces: {fn: l2mae, coefficient: 100}
  - noise:                    # not an output; follows the free-atom rule of forces
      fn: l2mae
      coefficient: 10         # λ_N
      # reduction: joint      # one mean over forces and noise; `separate` (MD17) takes one each
      # decay: null           # `linear` takes λ_N to zero over the epochs (MD17), or to `decay_floor` of it
model:
  name: fairchem_dens.models.EquiformerV2DeNS    # or equiformer_v2_dens
  # use_force_encoding: True                     # ablations of the paper: False hides the forces ...
  # use_denoising_energy: True                   # ... False asks for no energy of corrupted structures
  # use_noise_schedule_sigma_encoding: False     # True shows the model σ as well
```

A key that does not exist is refused with the nearest one that does, a value that is impossible with
what was found. Remove `dens` and `noise`, and the same YAML trains the same network without DeNS. All else is
fairchem's; the shipped YAMLs show it. In the tables, `null` and None are the same.
"""
_OTHER = """\
## What the trainer understands besides

| key | what |
|---|---|
| `logger: none` | no logger; fairchem's `tensorboard` and `wandb` as ever |
| all texts under `dataset` | `$NAME`, `${NAME:-default}` and `~` are expanded when a run starts |
| `dataset.*.format` | `lmdb`, `dens_lmdb` (All+MD), `oc22_lmdb`, and fairchem's other formats |
| `dataset.train.skip_bad_records` | True passes over records that cannot be read, and lists them |
| `dataset.relax` | structures for `--mode run-relaxations`; `task.relax_dataset` is moved there |
| `outputs.forces.train_on_free_atoms` | the noise follows it |
| `optim.load_balancing_on_error` | `warn_and_no_balance` unless you say otherwise |
| `optim.cuda_graph: True` | records a training step of Equiformer on a GPU ([here](md17.md)) |
| `optim.local_num_workers` | loader workers of each rank of a local run ([here](clusters.md)) |
| anything else under `optim` that nobody reads | a warning that names it |
"""
_THEIRS = """\
## The keys of the authors' code

{keys} are translated when `optim.use_denoising_pos` is on:

| theirs | ours |
|---|---|
| `optim.denoising_pos_params`: {params} | `dataset.train.transforms.dens`, with `switch: batch` |
| `optim.denoising_pos_coefficient` | `loss_functions`: `noise.coefficient` |
| `dataset.*.lin_ref` | `dataset.train.transforms.element_references` |
| trainer `denoising_forces` | the same trainer |

Both styles at once are an error. `configs/README.md` has the rest of the table.
"""


def attributes(documented: Any) -> dict[str, str]:
    """Return what a Google docstring says of each attribute or argument; names that share a line share it."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^(?:Attributes|Args):\n(.*?)(?=^\S|\Z)", text, flags=re.M | re.S)
    said: dict[str, str] = {}
    if section:
        for entry in re.split(r"\n(?=    \w)", section[1].rstrip()):
            names, _, meaning = entry.strip().partition(": ")
            said |= dict.fromkeys(re.split(r",\s*", names), " ".join(meaning.split()))
    return said


def page() -> str:
    """Return the whole page."""
    parts = [
        _HEAD,
        "## `dataset.train.transforms.dens`: the corruption\n\n" + _of_dataclass(Corruption),
        "A noise level is needed too: `std`, or all of `std_low`, `std_high` and `num_steps`. The noise of\n"
        "a structure is a pure function of (seed, epoch, structure): the same for any number of workers and\n"
        "GPUs.\n",
        "## `loss_functions`: `noise`\n\n" + _of_dataclass(NoiseLoss),
        "## `optim`: what is this package's own\n\n" + _of_dataclass(StepSettings),
        "## `model.finetune_config`\n\n" + _of_dataclass(FineTuning),
    ]
    for model, name in (
        (EquiformerV2DeNS, "equiformer_v2_dens"),
        (ESCNDeNS, "escn_dens"),
        (EquiformerDeNS, "equiformer_dens"),
    ):
        title = f"## `model`: `fairchem_dens.models.{model.__name__}`, or `{name}`"
        parts.append(f"{title}\n\n{_of_model(model)}")
    parts.append(_OTHER)
    keys = ", ".join(f"`optim.{key}`" for key in config._AUTHORS_KEYS)
    parts.append(_THEIRS.format(keys=keys, params=", ".join(f"`{key}`" for key in config._AUTHORS_PARAMS)))
    return "\n".join(parts)


def _of_dataclass(settings: Any) -> str:
    said = attributes(settings)
    rows = {}
    for field in dataclasses.fields(settings):
        if field.name != "where":  # of error messages, not of the YAML
            missing = field.default is dataclasses.MISSING
            rows[field.name] = ("needed" if missing else _value(field.default), said[field.name])
    return _table(rows)


def _of_model(model: Any) -> str:
    said = attributes(model)
    rows = {}
    for name, parameter in inspect.signature(model.__init__).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            rows[name] = (_value(parameter.default), said[name])
    return _table(rows)


def _value(value: Any) -> str:
    if value is None:
        return "`null`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _table(rows: Mapping[str, tuple[str, str]]) -> str:
    lines = ["| key | default | what |", "|---|---|---|"]
    for name, (default, meaning) in rows.items():
        lines.append(f"| `{name}` | {default} | {meaning.replace('``', '`').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
