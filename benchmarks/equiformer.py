"""Time of a training step of Equiformer on molecules, against the same network on e3nn's tensor products.

    python benchmarks/equiformer.py --device cuda --out benchmarks/results/equiformer.json

A step is: forward, forces, the paper's loss for MD17, backward through the forces, AdamW. The plain version
shares the parameters and computes as the paper's code does (fairchem_dens/models/equiformer/plain.py). On a
GPU our step is also recorded as a CUDA graph (`optim.cuda_graph: True`). The variants take turns, so that a
change of clock or load meets all of them. Operations are those that torch dispatches, without views and
allocations: about the number of kernels on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fairchem.core.common.utils import load_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch, Data
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write

from fairchem_dens import keys, objective
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.cuda_graph import CALLS_BEFORE_RECORDING, Recorded
from fairchem_dens.models import EquiformerDeNS
from fairchem_dens.models.equiformer.plain import PlainEquiformer
from fairchem_dens.ops import trilinear
from fairchem_dens.shipped import configs_folder

TRAIN_FRAMES = 950
NO_KERNELS = ("view", "reshape", "expand", "permute", "transpose", "slice", "select", "split", "unsqueeze")
NO_KERNELS += ("squeeze", "alias", "detach", "as_strided", "unbind", "t", "_unsafe_view", "promote_types")
NO_KERNELS += ("split_with_sizes", "empty", "empty_like", "new_empty", "empty_strided")
ASPIRIN = [6] * 7 + [8] * 4 + [6] * 2 + [1] * 8


def make_batch(structures: int, npz: Path | None, dens: bool) -> Batch:
    """Frames of a file of MD17; without one, random molecules of aspirin's size and density."""
    rng = np.random.default_rng(0)
    if npz is not None:
        file = np.load(npz)
        numbers, positions = file["nuclear_charges"], file["coords"][:structures]
    else:
        numbers = np.array(ASPIRIN)
        positions = np.stack([scattered(len(numbers), rng) for _ in range(structures)])
    made = [
        Data(
            pos=torch.tensor(one, dtype=torch.float32),
            atomic_numbers=torch.tensor(numbers).long(),
            natoms=len(numbers),
            fixed=torch.zeros(len(numbers)),
            energy=float(rng.normal()),
            forces=torch.tensor(rng.normal(size=one.shape), dtype=torch.float32),
            sid=place,
            fid=0,
        )
        for place, one in enumerate(positions)
    ]
    batch = Batch.from_data_list(made)
    if dens:
        batch = corrupt(
            batch, Corruption(prob=1.0, std=0.05, corrupt_ratio=0.25), seed=0, epoch=0, selected=True
        )
    return batch


def scattered(natoms: int, rng: np.random.Generator) -> np.ndarray:
    """Points in a flat ellipsoid, none closer than 1 Å to another."""
    chosen: list[np.ndarray] = []
    while len(chosen) < natoms:
        point = rng.uniform(-1, 1, size=3)
        if (point**2).sum() < 1:
            point = point * [4.5, 3.5, 1.5]
            if all(((point - other) ** 2).sum() > 1 for other in chosen):
                chosen.append(point)
    return np.array(chosen)


def loss_of(out: Mapping[str, Tensor], batch: Any, force_coefficient: float) -> Tensor:
    """The paper's loss for MD17."""
    energy = (out[keys.ENERGY] - batch[keys.ENERGY]).abs().mean()
    forces = (out[keys.FORCES] - batch[keys.FORCES]).norm(dim=-1)
    if keys.NOISE not in out:
        return energy + force_coefficient * forces.mean()
    atoms = objective.supervised_atoms(
        batch[keys.NOISE_MASK], batch[keys.FIXED], free_atoms_only=True, all_atoms=False
    )
    return energy + objective.force_and_noise_loss(
        forces,
        (out[keys.NOISE] - batch[keys.NOISE_VEC] / 0.05).norm(dim=-1),
        atoms,
        force_coefficient=force_coefficient,
        noise_coefficient=5.0,
        reduction="separate",
    )


class Variant:
    """A model, its optimizer and the batch that it is timed on."""

    def __init__(
        self, settings: dict[str, Any], batch: Batch, device: torch.device, *, plain: bool, record: bool
    ) -> None:
        torch.manual_seed(0)
        model = EquiformerDeNS(**settings).to(device).train()
        self.device, self.model = device, PlainEquiformer(model).train() if plain else model
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, capturable=on_gpu)
        self.batch = batch.clone().to(device)
        self.largest = int(batch[keys.NATOMS].max())
        names = [name for name in self.batch.keys() if isinstance(self.batch[name], Tensor)]  # noqa: SIM118
        self.tensors = {name: self.batch[name] for name in names if name != "ptr"}
        self._call: Callable[..., Any] = self._step
        if record:
            self._call = Recorded.on_gpu(self._step, device)

    def _step(self, tensors: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = Data(**tensors)
        batch[keys.LARGEST] = self.largest
        loss = loss_of(self.model(batch), batch, 80.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def step(self) -> Tensor:
        """One training step."""
        return self._call(self.tensors, {})["loss"]

    def timed(self) -> float:
        """Seconds of one step, until the device is done."""
        self._finish()
        start = time.perf_counter()
        self.step()
        self._finish()
        return time.perf_counter() - start

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def operations(self) -> int:
        """How many operations the loss and its gradients take, without the optimizer."""
        # In one piece, as on a GPU.
        with patch.object(trilinear, "CHUNK", sys.maxsize), Counted() as counted:
            batch = Data(**self.tensors)
            batch[keys.LARGEST] = self.largest
            loss_of(self.model(batch), batch, 80.0).backward()
        return counted.count

    def peak(self) -> float | None:
        """GiB that a step needs at most, all variants' weights included; None on the CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


class Counted(TorchDispatchMode):
    """Counts operations that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        if func.name().split("::")[1].split(".")[0] not in NO_KERNELS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure(args: argparse.Namespace, config: str) -> list[dict[str, Any]]:
    """Time all variants of one configuration; returns a row for each, the first being the plain one."""
    device = torch.device(args.device)
    settings = load_config(str(configs_folder() / "md17" / f"{config}.yml"))[0]
    model = {key: value for key, value in settings["model"].items() if key != "name"}
    if args.layers:
        model["num_layers"] = args.layers
    dens = "baseline" not in config
    structures = args.structures or settings["optim"]["batch_size"]
    batch = make_batch(structures, args.npz, dens)
    kinds = {"plain e3nn": (True, False), "ours": (False, False)}
    if device.type == "cuda":
        kinds["ours, CUDA graph"] = (False, True)
    variants = {
        name: Variant(model, batch, device, plain=plain, record=record)
        for name, (plain, record) in kinds.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        for _ in range(max(args.warm_up, CALLS_BEFORE_RECORDING + 1 if device.type == "cuda" else 0)):
            variant.step()
    for _ in tqdm(range(args.rounds), desc=config, leave=False):
        for name, variant in variants.items():
            seconds[name].append(variant.timed())
    plain = seconds["plain e3nn"]
    steps = -(-TRAIN_FRAMES // settings["optim"]["batch_size"]) * settings["optim"]["max_epochs"]
    rows = []
    for name, variant in variants.items():
        median = statistics.median(seconds[name])
        ratios = [theirs / ours for theirs, ours in zip(plain, seconds[name], strict=True)]
        rows.append(
            {
                "config": config,
                "variant": name,
                "structures": structures,
                "ms_per_step": round(1e3 * median, 2),
                "faster_than_plain": round(statistics.median(ratios), 3),
                "operations": variant.operations() if "graph" not in name else None,
                "peak_GiB": variant.peak(),
                "hours_of_the_papers_run": (
                    round(median * steps / 3600, 3)
                    if structures == settings["optim"]["batch_size"] and not args.layers
                    else None
                ),
                "last_loss": float(variant.step()),
            }
        )
    return rows


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--configs", nargs="+", default=["aspirin"], help="of configs/md17 (default: aspirin)"
    )
    parser.add_argument("--structures", type=int, help="in a batch, instead of the configuration's")
    parser.add_argument("--layers", type=int, help="instead of the configuration's 6")
    parser.add_argument("--npz", type=Path, help="a file of rMD17 to take frames from")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before timing (default: 3)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each variant (default: 20)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    rows = [row for config in args.configs for row in measure(args, config)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        result = {
            "benchmark": "equiformer",
            **describe(args.device),
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in vars(args).items()
                if key not in ("out", "npz")
            }
            | {"data": "rMD17" if args.npz else "random molecules"},
            "rows": rows,
        }
        write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
