"""Is it the same training? Losses of EquiformerV2 on our operations and on fairchem's modules, step by step.

    python benchmarks/same_training.py OC20_TRAJECTORIES --steps 200 --out benchmarks/results/x.json

Two models start from the same weights and see the same corrupted batches, made from the `.traj` files of
a folder, with the same random frames of edges; each follows its own gradients, with AdamW. Without
dropout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from torch_geometric.data import Batch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write
from training_step import loss_of

from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import data_from_atoms
from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.equiformer_v2 import paths

MODEL: dict[str, Any] = {
    "norm_type": "layer_norm_sh",
    "use_grid_mlp": True,
    "attn_activation": "silu",
    "ffn_activation": "silu",
    "weight_init": "uniform",
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
}
"""What the paper's configuration has and sizes do not change."""


def structures(folder: Path, every: int) -> list[Any]:
    """Frames of all trajectories of a folder, every so many, energies and forces normalised."""
    frames = [
        (index, number, atoms)
        for index, path in enumerate(sorted(folder.glob("*.traj")))
        for number, atoms in enumerate(ase.io.read(path, "::" + str(every)))
    ]
    energies = np.array([atoms.get_potential_energy() / len(atoms) for _, _, atoms in frames])
    scale = np.std(np.concatenate([atoms.get_forces().ravel() for _, _, atoms in frames]))
    made = []
    for (index, number, atoms), energy in zip(frames, energies, strict=True):
        forces = atoms.get_forces(apply_constraint=False) / scale
        normalised = (energy - energies.mean()) / energies.std()
        made.append(data_from_atoms(atoms, sid=index, fid=number, energy=normalised, forces=forces))
    return made


def train(frames: list[Any], args: argparse.Namespace) -> list[tuple[float, float]]:
    """Losses of each step, on our operations and on fairchem's modules."""
    settings = MODEL | {
        "max_radius": args.max_radius,
        "max_neighbors": args.neighbors,
        "num_layers": args.layers,
        "lmax_list": [args.lmax],
        "mmax_list": [2],
        "sphere_channels": args.channels,
        "attn_hidden_channels": args.channels // 2,
        "ffn_hidden_channels": args.channels,
        "attn_alpha_channels": args.channels // 2,
        "edge_channels": args.channels,
    }
    device = torch.device(args.device)
    models, optimizers = [], []
    for stock in (False, True):
        torch.manual_seed(args.seed)
        model = EquiformerV2DeNS(**settings).to(device).train()
        if stock:
            paths.choose(model, paths.FAIRCHEM)
        models.append(model)
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3))
    chosen = np.random.default_rng(args.seed)
    losses = []
    for step in tqdm(range(args.steps), leave=False):
        picked = chosen.integers(len(frames), size=args.batch)
        batch = Batch.from_data_list([frames[i].clone() for i in picked])
        noisy = Corruption(prob=0.5, std=0.1, corrupt_ratio=0.5)
        batch = corrupt(batch, noisy, seed=args.seed, epoch=step, selected=bool(step % 2)).to(device)
        pair = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)  # the frames of edges are rolled alike
            loss = loss_of(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100)
            optimizer.step()
            pair.append(loss.item())
        losses.append((pair[0], pair[1]))
    return losses


def main() -> int:
    """Train, print the largest relative difference, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with .traj files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="structures (default: 2)")
    parser.add_argument("--every", type=int, default=5, help="frames of a trajectory (default: each fifth)")
    parser.add_argument("--max-radius", type=float, default=12.0, help="Å (default: 12)")
    parser.add_argument("--neighbors", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lmax", type=int, default=3)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    losses = train(structures(args.folder, args.every), args)
    differences = [abs(ours - theirs) / theirs for ours, theirs in losses]
    first, last = (np.mean([pair[1] for pair in part]) for part in (losses[:20], losses[-20:]))
    print(
        f"{args.steps} steps, loss from {first:.4g} to {last:.4g} (means of 20): largest relative difference "
        f"{max(differences):.2e}, median {np.median(differences):.2e}"
    )
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "folder")}
        write(
            args.out,
            {
                "benchmark": "same_training",
                **describe(args.device),
                "settings": settings,
                "largest_relative_difference": max(differences),
                "losses": losses,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
