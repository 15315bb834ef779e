"""Structures that a loader brings to the model each second, with and without corruption, against fairchem's.

    python benchmarks/reading.py --out benchmarks/results/reading_cpu.json

Each round passes once over the same LMDBs with every variant, so that a change of clock or load meets all of
them. Structures are generated, of OC20's size and fields, unless --src names LMDBs with energies and forces.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.lmdb_dataset import LmdbDataset, data_list_collater
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write

import fairchem_dens.register  # noqa: F401  makes the transform known
from fairchem_dens.corruption import Corruption, batch_is_corrupted, corrupt
from fairchem_dens.data.collate import collate
from fairchem_dens.data.lmdb import LmdbWriter
from fairchem_dens.data.reader import LazyLmdbDataset
from fairchem_dens.transforms import ArmedCorruption

PAPER = {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5}
BASELINE = "fairchem"


def write_structures(folder: Path, count: int, natoms: int) -> None:
    """Write structures of ``natoms`` atoms, give or take half, with the fields of OC20."""
    rng = np.random.default_rng(0)
    with LmdbWriter(folder, structures_per_file=max(1, count // 2)) as writer:
        for index in tqdm(range(count), desc="writing structures", leave=False):
            size = int(rng.integers(natoms // 2, natoms + natoms // 2 + 1))
            data = Data(
                pos=torch.from_numpy(rng.uniform(0, 15, (size, 3))).float(),
                cell=15 * torch.eye(3)[None],
                pbc=torch.ones(1, 3, dtype=torch.bool),
                atomic_numbers=torch.from_numpy(rng.integers(1, 84, size)),
                natoms=size,
                tags=torch.from_numpy(rng.integers(0, 3, size)),
                fixed=torch.from_numpy(rng.integers(0, 2, size)),
                energy=float(rng.normal()),
                forces=torch.from_numpy(rng.normal(scale=0.3, size=(size, 3))).float(),
                sid=index,
                fid=0,
            )
            writer.add(data)


@contextmanager
def source(args: argparse.Namespace) -> Iterator[str]:
    """The folder that is read; a generated one goes at the end."""
    if args.src is not None:
        yield str(args.src)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "structures"
        write_structures(folder, args.structures, args.natoms)
        yield str(folder)


class Variant:
    """One way to make batches of all structures."""

    def __init__(
        self,
        dataset: Any,
        collater: Callable[[list[Data]], Any],
        *,
        corruption: Corruption | None = None,
        batch_size: int,
        workers: int,
    ) -> None:
        self.corruption = corruption
        if corruption is not None:
            dataset.transforms.config = {"dens": ArmedCorruption(corruption, 0, epoch=lambda: 0)}
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collater,
            persistent_workers=workers > 0,  # what starting them takes is another matter
        )

    def seconds(self) -> float:
        """Time of one pass."""
        start = time.perf_counter()
        for step, batch in enumerate(self.loader, start=1):
            self._as_the_trainer_does(batch, step)
        return time.perf_counter() - start

    def _as_the_trainer_does(self, batch: Any, step: int) -> None:
        corruption = self.corruption
        if corruption is None or corruption.switch != "batch":
            return
        if batch_is_corrupted(corruption, seed=0, step=step):
            corrupt(batch, corruption, seed=0, epoch=0, selected=True)


def variants(src: str, batch_size: int, workers: int) -> dict[str, Variant]:
    """All variants by name; the first is the baseline."""
    make = partial(Variant, batch_size=batch_size, workers=workers)
    config = {"src": src}
    theirs, ours = partial(data_list_collater, otf_graph=True), partial(collate, otf_graph=True)
    by_structure, by_batch = Corruption(**PAPER), Corruption(**PAPER, switch="batch")
    return {
        BASELINE: make(LmdbDataset(config), theirs),
        "fairchem, corrupted": make(LmdbDataset(config), theirs, corruption=by_structure),
        "fairchem, our collation": make(LmdbDataset(config), ours),
        "our reader": make(LazyLmdbDataset(config), theirs),
        "our reader, corrupted": make(LazyLmdbDataset(config), theirs, corruption=by_structure),
        "ours": make(LazyLmdbDataset(config), ours),
        "ours, corrupted": make(LazyLmdbDataset(config), ours, corruption=by_structure),
        "ours, corrupted by batch": make(LazyLmdbDataset(config), ours, corruption=by_batch),
    }


def measure(src: str, args: argparse.Namespace, workers: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    compared = variants(src, args.batch_size, workers)
    count = len(compared[BASELINE].loader.dataset)  # type: ignore[arg-type]  # it has a length
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for variant in compared.values():
        variant.seconds()
    for _ in tqdm(range(args.rounds), desc=f"{workers} workers", leave=False):
        for name, variant in compared.items():
            seconds[name].append(variant.seconds())
    rows = []
    for name, times in seconds.items():
        row = {
            "variant": name,
            "workers": workers,
            "structures_per_second": round(count / statistics.median(times), 1),
            "us_per_structure": round(1e6 * statistics.median(times) / count, 1),
            "faster_than_fairchem": round(median_ratio(seconds[BASELINE], times), 3),
        }
        plain, *more = name.split(", corrupted")
        if more:
            added = [after - before for after, before in zip(times, seconds[plain], strict=True)]
            row |= {
                "corruption_us": round(1e6 * statistics.median(added) / count, 1),
                "corruption_share_of_this": round(median_ratio(added, seconds[plain]), 3),
                "corruption_share_of_fairchem": round(median_ratio(added, seconds[BASELINE]), 3),
            }
        rows.append(row)
    return rows


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--src", type=Path, help="LMDB file or folder to read instead of generated structures"
    )
    parser.add_argument("--structures", type=int, default=2000, help="to generate (default: 2000)")
    parser.add_argument(
        "--natoms", type=int, default=80, help="atoms of a structure, on average (default: 80)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="structures in a batch (default: 4)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="loader workers (default: 0 2)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each variant (default: 7)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in loader workers
    with source(args) as src:
        rows = [row for workers in args.workers for row in measure(src, args, workers)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "src")}
        settings |= {"generated": args.src is None, "corruption": PAPER}
        write(args.out, {"benchmark": "reading", **describe("cpu"), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
