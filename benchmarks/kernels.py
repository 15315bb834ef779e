"""Each fused operation against its plain twin, forward and backward.

    python benchmarks/kernels.py --precisions fp32 tf32 bf16 --out benchmarks/results/x.json

Sizes are those of the paper's OC20 model on 8 structures of 80 atoms. Both take turns; times are medians over
the rounds, until the device is done. Gigabytes are what an operation must read and write at least: its inputs
and output, and backward their gradients; teraflops are those of its matrix products, if it has any. The error
is the largest difference from float64 over the largest value, of output and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.ops import fused
from fairchem_dens.ops import rotate as plain_rotate
from fairchem_dens.ops.fused import rotate as fused_rotate
from fairchem_dens.ops.layout import Rows, edges_from
from fairchem_dens.ops.operations import PLAIN, Operations

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """An operation at one size.

    Attributes:
        fused, plain: the two.
        inputs: tensors; those with a gradient are the ones it is taken of.
        flops: of the matrix products of a forward pass.
    """

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    flops: float = 0.0


def cases(args: argparse.Namespace, ours: Operations, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """All operations, on tensors drawn from a fixed seed."""
    torch.manual_seed(0)
    rows, nodes, device = Rows(args.lmax, min(2, args.lmax)), args.nodes, args.device
    channels, hidden, heads = args.channels, args.channels // 2, 8
    points = (2 * (args.lmax + 1) + 4) ** 2
    target = torch.arange(nodes).repeat_interleave(args.neighbors)
    edges = edges_from(
        torch.randint(nodes, target.shape).to(device), target.to(device), nodes, at_most=args.neighbors
    )

    def learned(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=kind, requires_grad=True)

    single = torch.float32
    frames = torch.linalg.qr(torch.randn(len(edges), 3, 3, device=device))[0]
    frames = frames * torch.linalg.det(frames)[:, None, None]
    wigner = PLAIN.wigner_packed(frames, rows)
    kept, full = torch.randn(points, rows.num_kept), torch.randn(points, rows.num_full)
    kept, full = kept.to(device) / points**0.5, full.to(device) / points**0.5

    def on_edges(path: Any) -> Callable[..., Tensor]:
        return lambda x, scale, wigner: path.rotate(x, edges, wigner, scale, rows)

    def attention(path: Operations) -> Callable[..., Tensor]:
        return lambda values, logits, wigner: path.attend(values, logits, wigner, edges, rows, None)

    def embedding(path: Operations) -> Callable[..., Tensor]:
        return lambda radial, wigner: path.edge_degree(radial, wigner, edges, rows)

    def norm(path: Operations) -> Callable[..., Tensor]:
        return lambda x, weight, bias: path.equivariant_norm(x, weight, bias, 1e-5, "layer_norm_sh")

    def rotations(path: Operations) -> Callable[..., Tensor]:
        return lambda frames: path.wigner_packed(frames, rows)

    scale = learned(len(edges), rows.num_radial, 2 * channels)
    x = learned(nodes, rows.num_full, channels, kind=single)
    yield "rotate", Case(on_edges(fused_rotate), on_edges(plain_rotate), [x, scale, wigner])
    inputs = [learned(len(edges), rows.num_kept, channels), learned(len(edges), heads), wigner]
    yield "attend", Case(attention(ours), attention(PLAIN), inputs)
    inputs = [learned(len(edges), rows.num_kept, hidden), learned(len(edges), hidden), kept, kept]
    flops = 4.0 * points * rows.num_kept * len(edges) * hidden
    yield "s2_activation", Case(ours.s2_activation, PLAIN.s2_activation, inputs, flops)
    inputs = [learned(nodes, rows.num_full, channels), learned(channels, channels, kind=single), full, full]
    flops = nodes * points * channels * (4.0 * rows.num_full + 2 * channels)
    yield "grid_mlp", Case(ours.grid_mlp, PLAIN.grid_mlp, inputs, flops)
    inputs = [x, learned(rows.lmax + 1, channels, kind=single), learned(channels, kind=single)]
    yield "equivariant_norm", Case(norm(ours), norm(PLAIN), inputs)
    inputs = [learned(len(edges), rows.lmax + 1, channels), wigner]
    yield "edge_degree", Case(embedding(ours), embedding(PLAIN), inputs)
    yield "wigner_packed", Case(rotations(ours), rotations(PLAIN), [frames])


def wait(device: str) -> None:
    """Until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(args: argparse.Namespace, call: Callable[[], Any]) -> float:
    """Seconds of a call, the mean over some in a row, so that the launch of one hides behind another."""
    wait(args.device)
    start = time.perf_counter()
    for _ in range(args.repeats):
        call()
    wait(args.device)
    return (time.perf_counter() - start) / args.repeats


def results(operation: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients, for a gradient of the output that is the same for all."""
    out = operation(*inputs)
    learned = [one for one in inputs if one.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *(torch.autograd.grad(out, learned, weights) if learned else [])]


def errors(case: Case, kind: str) -> list[float]:
    """How far the output and the worst gradient of the fused or the plain operation are from float64."""
    inputs = [one.detach().double().requires_grad_(one.requires_grad) for one in case.inputs]
    exact = results(case.plain, inputs)
    found = results(getattr(case, kind), case.inputs)
    wrong = [
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, exact, strict=True)
    ]
    return [wrong[0], max(wrong[1:], default=0.0)]


def measure(args: argparse.Namespace, name: str, case: Case, precision: str) -> dict[str, Any]:
    """One row of the table."""
    learned = [one for one in case.inputs if one.requires_grad]
    seconds: dict[tuple[str, str], list[float]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for kind in ("plain", "fused"):
        operation = getattr(case, kind)
        out = operation(*case.inputs)
        calls[kind, "forward"] = lambda operation=operation: operation(*case.inputs)
        if learned:
            gradient = torch.ones_like(out)
            calls[kind, "backward"] = lambda out=out, gradient=gradient: torch.autograd.grad(
                out, learned, gradient, retain_graph=True
            )
    for call in calls.values():
        for _ in range(args.warm_up):
            call()
    for _ in range(args.rounds):
        for key, call in calls.items():
            seconds.setdefault(key, []).append(timed(args, call))
    moved = sum(one.nbytes for one in [*case.inputs, out])
    row: dict[str, Any] = {"operation": name, "precision": precision}
    for which in ("forward", "backward"):
        if ("fused", which) not in seconds:
            continue
        plain, ours = seconds["plain", which], seconds["fused", which]
        median = statistics.median(ours)
        gigabytes = (moved + (sum(one.nbytes for one in learned) if which == "backward" else 0)) / 1e9
        row |= {
            f"{which}_plain_us": round(1e6 * statistics.median(plain), 1),
            f"{which}_fused_us": round(1e6 * median, 1),
            f"{which}_faster": round(statistics.median(a / b for a, b in zip(plain, ours, strict=True)), 2),
            f"{which}_GB_per_s": round(gigabytes / median, 1),
        }
        if case.flops:
            products = case.flops * (2 if which == "backward" else 1)
            row[f"{which}_TFLOP_per_s"] = round(products / median / 1e12, 2)
    if args.errors:
        row |= {
            f"{kind}_errors": [f"{wrong:.1e}" for wrong in errors(case, kind)] for kind in ("fused", "plain")
        }
    return row


def main() -> int:
    """Measure all operations, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nodes", type=int, default=640)
    parser.add_argument("--neighbors", type=int, default=20)
    parser.add_argument("--lmax", type=int, default=6)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--operations", nargs="+", help="some of them only")
    parser.add_argument("--errors", action="store_true", help="compare with float64 as well")
    parser.add_argument("--warm-up", type=int, default=3, help="calls before timing (default: 3)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--repeats", type=int, default=5, help="calls in a round (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    os.environ.setdefault(fused.SWITCH, "fused")
    ours = fused.operations()
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, interpreted"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "kernels",
        "device": device,
        "versions": versions,
        "settings": settings,
        "rows": rows,
    }
    for precision in args.precisions:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        for name, case in cases(args, ours, DTYPES[precision]):
            if args.operations is None or name in args.operations:
                rows.append(measure(args, name, case, precision))
                print(json.dumps(rows[-1]), flush=True)
        if args.out:  # after each, in case that there is no time for all
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
