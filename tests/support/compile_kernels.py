"""Compiles all kernels at the size of the paper's model for a GPU that need not be there.

    python compile_kernels.py 90 bfloat16

Triton brings its own compiler; only launching needs a device. So nothing is launched: the operations run,
with their gradients, on tensors without meaning, and each kernel they would launch is compiled, for a later
run, too; kernels that walk the edges of a node for any number of them, and for 20 into each. Printed is a
line of JSON for each: name, that number, registers, bytes of stack (what did not fit in registers) and of
shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fairchem_dens.ops.layout import Rows, edges_from

CHANNELS, HIDDEN, HEADS, POINTS = 128, 64, 8, 324
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """What Triton asks of the driver when it compiles.

    Args:
        capability: of the GPU to compile for, as 90.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_instead(kernel: Any, grid: tuple[int, ...], on: Any, *arguments: Any, **constants: Any) -> None:
    """Take the place of `fairchem_dens.ops.fused.launching.launch`."""
    compiled = kernel.warmup(*arguments, grid=grid, **constants)
    for one in arguments:
        if isinstance(one, torch.Tensor) and one.dtype == torch.int32:
            one.zero_()  # numbers that a later step would go by
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=False
        )
    usage = told.stdout + told.stderr
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
    line = {"kernel": name, "each": constants.get("EACH"), "registers": registers, "stack": stack}
    line["shared"] = compiled.metadata.shared
    print(json.dumps(line), flush=True)


def main(capability: int, precision: str) -> None:
    """Compile all, for features of a type of torch's, or of float32 multiplied in tf32."""
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    driver.set_active(NoDevice(capability))
    names = ("attend", "edge_degree", "grid_ffn", "neighbours", "norm", "rotate", "s2_activation", "wigner")
    modules = {name: import_module(f"fairchem_dens.ops.fused.{name}") for name in names}
    for module in modules.values():
        module.launch = compile_instead

    def learned(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=kind, requires_grad=True)

    rows, one_each = Rows(6, 2), torch.arange(3)
    of_any = edges_from(one_each, one_each, 3)
    of_twenty = edges_from(one_each.repeat(20), one_each.repeat_interleave(20), 3, at_most=20)
    single = torch.float32
    kept, full = torch.randn(POINTS, rows.num_kept), torch.randn(POINTS, rows.num_full)
    x = learned(3, rows.num_full, CHANNELS, kind=single)
    outputs = []
    for edges in (of_any, of_twenty):
        number = len(edges)
        wigner = modules["wigner"].wigner_packed(torch.randn(number, 3, 3), rows)
        scale, logits = learned(number, rows.num_radial, 2 * CHANNELS), learned(number, HEADS)
        values, dropout = learned(number, rows.num_kept, CHANNELS), torch.ones(number, HEADS)
        outputs += [
            modules["rotate"].rotate(x, edges, wigner, scale, rows),
            modules["attend"].attend(values, logits, wigner, edges, rows, dropout),
            modules["edge_degree"].edge_degree(learned(number, 7, CHANNELS), wigner, edges, rows),
        ]
    outputs += [
        modules["s2_activation"].s2_activation(
            learned(3, rows.num_kept, HIDDEN), learned(3, HIDDEN), kept, kept
        ),
        *(
            modules["norm"].equivariant_norm(
                x, learned(7, CHANNELS, kind=single), learned(CHANNELS, kind=single), 1e-5, kind
            )
            for kind in modules["norm"].SPLIT
        ),
    ]
    if precision != "float32":  # in full single precision the network on the grid is left to the plain twin
        weight = learned(CHANNELS, CHANNELS, kind=single)
        outputs.append(modules["grid_ffn"].grid_mlp(learned(3, rows.num_full, CHANNELS), weight, full, full))
    for out in outputs:
        out.sum().backward()
    atoms, cell = torch.zeros(6, dtype=torch.long), torch.eye(3)[None]
    periodic = torch.ones(1, 3, dtype=torch.bool)
    for strict in (True, False):
        modules["neighbours"].neighbours(
            torch.randn(6, 3), cell, atoms, torch.tensor([6]), periodic, 6.0, 20, strict
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
