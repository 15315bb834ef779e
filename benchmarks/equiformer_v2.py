"""Our EquiformerV2 with DeNS against fairchem-core 1.10.0's own, `equiformer_v2_dens_backbone` and its heads.

    python benchmarks/equiformer_v2.py --layers 2 --structures 1 --natoms 132 --out benchmarks/results/x.json

Both have the same weights, the same batch and the same precision, and take turns in one process. Reported
are medians over the rounds; ratios are medians of the ratios of a round. A training call is the forward and
backward pass of corrupted structures, an inference call the forward pass of structures as they are. The
errors are those of outputs and gradients against our operations in float64, which tests hold to fairchem's
modules within 1e-12. fairchem's model draws frames of edges that depend on the precision, so its errors are
those of its modules in our frames.

On the CPU time is that of the processor, which does not count what other programs take (with one thread:
OMP_NUM_THREADS=1). Peak memory is what torch's allocator has out at once, beyond weights and batch, as its
profiler records it; waits are operations that would make the host wait for a GPU. On a GPU both are
measured.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.utils import load_config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write
from stock_model import StockModel
from training_step import CONFIG, PRECISIONS, loss_of, make_batch

from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.equiformer_v2 import memory, paths
from fairchem_dens.shipped import configs_folder

MODES = ("training", "inference")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
         "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::is_nonzero")  # fmt: skip
STOCK = "fairchem"


class Variant:
    """A model on one path, with what it is timed on.

    Args:
        model: with weights; its mode is set.
        batch: on the device.
        mode: one of `MODES`.
        precision: one of `PRECISIONS`.
    """

    def __init__(self, model: nn.Module, batch: Any, mode: str, precision: str) -> None:
        self.model, self.batch, self.mode = model.train(mode == "training"), batch, mode
        self.device, self.kind = batch.pos.device, HALF.get(precision)

    def __call__(self) -> dict[str, Tensor]:
        """One forward pass, in training with the backward pass of the paper's loss."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with (
            torch.set_grad_enabled(self.mode == "training"),
            torch.autocast(self.device.type, dtype=self.kind) if self.kind else nullcontext(),
        ):
            out = self.model(self.batch)
        if self.mode == "training":
            loss_of({name: value.float() for name, value in out.items()}, self.batch).backward()
        return out

    def seconds(self) -> float:
        """Time of one call, until the device is done; on a CPU, of the processor alone."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self._wait()
        start = clock()
        self()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def counts(self) -> dict[str, Any]:
        """Peak memory, kernels and waits of one call."""
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            peak = torch.cuda.max_memory_allocated(self.device) - before
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
                self()
                self._wait()
            events = recorded.events()
            kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
            waits = sum(event.name == "cudaStreamSynchronize" for event in events)
            return {"peak_MiB": peak / 2**20, "kernels": kernels, "waits": waits}
        counter = _Counter()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, counter:
            self()
        return {"peak_MiB": _peak(recorded) / 2**20, "kernels": counter.kernels, "waits": counter.waits}


class _Counter(TorchDispatchMode):
    """Counts operations that are not views, and those that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += not func.is_view
        self.waits += f"aten::{func._schema.name.partition('::')[2]}" in {w.partition(".")[0] for w in WAITS}
        return out


def _peak(recorded: Any) -> int:
    """Most bytes out at once, counted from the start of a recording."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def errors(models: dict[str, EquiformerV2DeNS], batch: Any, precision: str) -> dict[str, dict[str, float]]:
    """Root mean square errors against float64 in evaluation mode, relative to the root mean square."""
    exact = copy.deepcopy(next(iter(models.values()))).double()
    reference = _results(exact, _double(batch), "fp32")
    found = {}
    for name, model in models.items():
        values = _results(model, batch, precision)
        squares = {
            kind: [
                (float((values[key].double() - want).square().sum()), float(want.square().sum()))
                for key, want in reference.items()
                if key.startswith("gradient:") == (kind == "gradients")
            ]
            for kind in ("outputs", "gradients")
        }
        found[name] = {
            kind: (sum(difference for difference, _ in both) / sum(size for _, size in both)) ** 0.5
            for kind, both in squares.items()
        }
    return found


def _results(model: EquiformerV2DeNS, batch: Any, precision: str) -> dict[str, Tensor]:
    variant = Variant(copy.deepcopy(model), batch, "training", precision)
    variant.model.eval()  # the roll of the frames is fixed, and nothing is dropped
    out = {name: value.detach() for name, value in variant().items()}
    return out | {
        f"gradient:{name}": parameter.grad
        for name, parameter in variant.model.named_parameters()
        if parameter.grad is not None
    }


def _double(batch: Any) -> Any:
    return batch.clone().apply(lambda value: value.double() if value.is_floating_point() else value)


def measure(args: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Time one case; returns a row for each variant."""
    settings = load_config(str(configs_folder() / CONFIG))[0]["model"]
    settings |= {
        "num_layers": case["layers"],
        "lmax_list": [case["lmax"]],
        "mmax_list": [min(case["lmax"], args.mmax)],
        "max_neighbors": case["neighbors"],
        # Paths differ in when they draw random numbers on a GPU; the comparison is of arithmetic.
        "alpha_drop": 0.0,
        "drop_path_rate": 0.0,
    }
    settings.pop("name")
    device = torch.device(args.device)
    clean = make_batch(case["structures"], case["natoms"])
    noise = Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5)
    corrupted = corrupt(clean, noise, seed=0, epoch=0, selected=True).to(device)
    batch = corrupted if case["mode"] == "training" else clean.to(device)
    ours = {}
    for level in args.recompute:
        torch.manual_seed(0)
        ours[level] = EquiformerV2DeNS(**settings, recompute=level, kernels=args.kernels).to(device)
    first = ours[args.recompute[0]]
    models: dict[str, nn.Module] = {STOCK: StockModel(settings, first).to(device), **ours}
    mode, precision = case["mode"], case["precision"]
    variants = {name: Variant(model, batch, mode, precision) for name, model in models.items()}
    with _tf32(precision == "tf32"):
        counts = {name: variant.counts() for name, variant in variants.items()}
        wrong = {}
        if args.errors:
            theirs = copy.deepcopy(first)
            paths.choose(theirs, paths.FAIRCHEM)
            wrong = errors({**ours, STOCK: theirs}, corrupted, precision)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for variant in variants.values():
            for _ in range(args.warm_up):
                variant()
        for _ in tqdm(range(args.rounds), desc=str(case), leave=False):
            for name, variant in variants.items():
                seconds[name].append(variant.seconds())
    rows = []
    for name in variants:
        pairs = zip(seconds[STOCK], seconds[name], strict=True)
        rows.append(
            case
            | {
                "variant": name if name == STOCK else f"ours, {args.kernels}, recompute {name}",
                "ms": round(1e3 * statistics.median(seconds[name]), 2),
                "faster": round(statistics.median(theirs / ours for theirs, ours in pairs), 2),
                "leaner": round(counts[STOCK]["peak_MiB"] / counts[name]["peak_MiB"], 2),
            }
            | {key: round(value, 1) for key, value in counts[name].items()}
            | {f"error_of_{kind}": value for kind, value in wrong.get(name, {}).items()}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row.get(name, "") for name in names]
        cells = [
            f"{value:.1e}" if name.startswith("error") else str(value)
            for name, value in zip(names, values, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure all cases, print a table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    axes: dict[str, Callable[[str], Any]] = {
        "structures": int, "natoms": int, "neighbors": int, "layers": int, "lmax": int
    }  # fmt: skip
    defaults = {"structures": [8], "natoms": [80], "neighbors": [20], "layers": [12], "lmax": [6]}
    for name, kind in axes.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=defaults[name])
    parser.add_argument("--mmax", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["training"])
    parser.add_argument("--recompute", nargs="+", choices=memory.LEVELS, default=["activations"])
    parser.add_argument("--kernels", choices=paths.KERNELS, default="auto")
    parser.add_argument("--errors", action="store_true", help="compare with float64 as well")
    parser.add_argument("--warm-up", type=int, default=2, help="calls before timing (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each variant (default: 9)")
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it, as .md")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    names = [*axes, "precision", "mode"]
    values = [getattr(args, name) for name in axes] + [args.precisions, args.modes]
    for combination in itertools.product(*values):
        case = dict(zip(names, combination, strict=True))
        try:
            rows += measure(args, case)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{case}: {str(error).splitlines()[0]}")
            torch.cuda.empty_cache()
    print(table(rows))
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        write(
            args.out,
            {"benchmark": "equiformer_v2", **describe(args.device), "settings": settings, "rows": rows},
        )
        args.out.with_suffix(".md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
