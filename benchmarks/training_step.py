"""Time and memory of one training step of EquiformerV2, with and without DeNS, against fairchem's own.

    python benchmarks/training_step.py --device cuda --out benchmarks/results/training_step.json

A step is: forward, the paper's loss, backward, gradient clipping, AdamW. The structures are slabs of one
size, displaced at random, with random forces; the model is that of
configs/oc20/equiformer_v2_dens_2M_12ep.yml (or smaller, by --layers and --lmax). The variants take turns, so
that a change of clock or load meets all of them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import fcc111
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_config, setup_imports
from torch_geometric.data import Batch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write

from fairchem_dens import keys, objective
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import data_from_atoms
from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.shipped import configs_folder

CONFIG = "oc20/equiformer_v2_dens_2M_12ep.yml"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
NOT_IN_BACKBONE = ("name", "regress_forces")


def make_batch(structures: int, natoms: int) -> Batch:
    """Slabs of copper, ``natoms`` atoms each, as close to cubes as that allows, the lower half fixed."""
    shapes = itertools.product(range(1, natoms + 1), repeat=2)
    sizes = [(x, y, natoms // (x * y)) for x, y in shapes if natoms % (x * y) == 0]
    size = min(sizes, key=lambda one: (max(one) - min(one), one[2]))
    rng = np.random.default_rng(0)
    made = []
    for index in range(structures):
        atoms = fcc111("Cu", size, vacuum=8.0, periodic=True)
        atoms.rattle(0.1, seed=index)
        data = data_from_atoms(
            atoms, sid=index, fid=0, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3))
        )
        data[keys.FIXED] = (data.pos[:, 2] < data.pos[:, 2].median()).long()
        made.append(data)
    return Batch.from_data_list(made)


def our_model(settings: dict[str, Any]) -> torch.nn.Module:
    """The model of this package."""
    return EquiformerV2DeNS(**{key: value for key, value in settings.items() if key != "name"})


def fairchem_model(settings: dict[str, Any]) -> torch.nn.Module:
    """EquiformerV2 as fairchem has it, of the same size."""
    backbone = {key: value for key, value in settings.items() if key not in NOT_IN_BACKBONE}
    return registry.get_model_class("hydra")(
        backbone={"model": "equiformer_v2_backbone", **backbone},
        heads={
            "energy": {"module": "equiformer_v2_energy_head"},
            "forces": {"module": "equiformer_v2_force_head"},
        },
        pass_through_head_outputs=True,
        otf_graph=True,
    )


def loss_of(out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """The paper's loss for OC20 2M."""
    energy = 2 * (out[keys.ENERGY].view(-1) - batch[keys.ENERGY]).abs().mean()
    forces = (out[keys.FORCES] - batch[keys.FORCES]).norm(dim=-1)
    if keys.NOISE_MASK not in batch:
        free = batch[keys.FIXED] == 0
        return energy + 100 * (forces * free).sum() / free.sum()
    atoms = objective.supervised_atoms(
        batch[keys.NOISE_MASK], batch[keys.FIXED], free_atoms_only=True, all_atoms=False
    )
    noise = (out[keys.NOISE] - batch[keys.NOISE_VEC] / 0.1).norm(dim=-1)
    return energy + objective.force_and_noise_loss(
        forces,
        noise,
        atoms,
        force_coefficient=100,
        noise_coefficient=10,
        reduction="joint",
        sum_over_ranks=lambda counts: counts,
        num_ranks=1,
    )


class Variant:
    """A model, its optimizer and the batch that it is timed on."""

    def __init__(
        self, build: Callable[[], torch.nn.Module], batch: Batch, device: torch.device, precision: str
    ) -> None:
        self.batch, self.device, self.precision = batch.clone().to(device), device, precision
        torch.manual_seed(0)
        self.model = build().to(device).train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-3)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.loss = float("nan")

    def step(self) -> None:
        """One training step."""
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
        kind = kinds.get(self.precision)
        with torch.autocast(self.device.type, dtype=kind) if kind else nullcontext():
            out = self.model(self.batch)
        loss = loss_of({name: value.float() for name, value in out.items()}, self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 100)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss = loss.item()

    def timed(self) -> float:
        """Seconds of one step, until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def peak(self) -> float | None:
        """GiB that a step needs at most, all variants' weights included; None on the CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


def measure(args: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """Time all variants in one precision; returns a row for each, the first being fairchem's."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    device = torch.device(args.device)
    settings = load_config(str(configs_folder() / CONFIG))[0]["model"]
    settings |= {"num_layers": args.layers or settings["num_layers"]}
    if args.lmax:
        settings |= {"lmax_list": [args.lmax], "mmax_list": [min(args.lmax, 2)]}
    plain = make_batch(args.structures, args.natoms)
    noisy = corrupt(plain, Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5), seed=0, epoch=0, selected=True)
    variants = {
        "fairchem EquiformerV2": Variant(partial(fairchem_model, settings), plain, device, precision),
        "ours, ordinary step": Variant(
            partial(our_model, settings | {"predict_noise": False}), plain, device, precision
        ),
        "ours, DeNS step": Variant(partial(our_model, settings), noisy, device, precision),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        for _ in range(args.warm_up):
            variant.step()
    for _ in tqdm(range(args.rounds), desc=precision, leave=False):
        for name, variant in variants.items():
            seconds[name].append(variant.timed())
    first = seconds["fairchem EquiformerV2"]
    return [
        {
            "variant": name,
            "precision": precision,
            "ms_per_step": round(1e3 * statistics.median(seconds[name]), 2),
            "structures_per_second": round(args.structures / statistics.median(seconds[name]), 2),
            "faster_than_fairchem": round(
                statistics.median(theirs / ours for theirs, ours in zip(first, seconds[name], strict=True)), 3
            ),
            "peak_GiB": variant.peak(),
            "last_loss": variant.loss,
        }
        for name, variant in variants.items()
    ]


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--structures", type=int, default=8, help="in a batch (default: 8)")
    parser.add_argument("--natoms", type=int, default=80, help="of each (default: 80)")
    parser.add_argument("--layers", type=int, help="instead of the configuration's 12")
    parser.add_argument("--lmax", type=int, help="instead of the configuration's 6")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--warm-up", type=int, default=3, help="steps before timing (default: 3)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each variant (default: 10)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    setup_imports()
    rows = []
    for precision in args.precisions:
        try:
            rows += measure(args, precision)
        except torch.cuda.OutOfMemoryError as error:
            rows.append({"precision": precision, "error": str(error).splitlines()[0]})
            torch.cuda.empty_cache()
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        result = {
            "benchmark": "training_step",
            **describe(args.device),
            "settings": {key: value for key, value in vars(args).items() if key != "out"},
            "rows": rows,
        }
        write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
