"""The neighbours of each atom in its structure and its periodic images.

A program belongs to an atom and goes through all atoms of its structure in all images that can be near, as
often as it needs: nothing of that is ever stored. How far the last neighbour is, it finds by bisection, in
whose steps it only counts; squared distances are compared as integers, whose order is the same for positive
numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_dens.ops.fused.launching import launch

_CANDIDATES = 256
"""Candidates that a program looks at together."""
SAME_DISTANCE = 1e-3
"""Å². Squared distances closer than this count as equal, as in `fairchem_dens.models.graph`."""
TOLERANCE = 1e-2
"""Å². How much farther than the first one too many a neighbour may be if not so many are wanted strictly."""
SAME_ATOM = 1e-4
"""Å². Below this, a candidate is the atom itself. This and the tolerance are those of fairchem's search."""


@triton.jit
def _squared_distance(
    candidate, pos, cell, repeats, x, y, z, structure, first, last, T: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Squared distances of candidates, source by source and image by image; negative beyond the last one."""
    rx = tl.load(repeats + structure * 3)
    ry = tl.load(repeats + structure * 3 + 1)
    rz = tl.load(repeats + structure * 3 + 2)
    ny, nz = 2 * ry + 1, 2 * rz + 1
    images = (2 * rx + 1) * ny * nz
    source = first + candidate // images
    image = candidate % images
    a = (image // (ny * nz) - rx).to(tl.float32)
    b = ((image // nz) % ny - ry).to(tl.float32)
    c = (image % nz - rz).to(tl.float32)
    exists = source < last
    vectors = cell + structure * 9
    at = pos + source.to(tl.int64) * 3
    dx = tl.load(at, mask=exists, other=0.0) - x
    dx += a * tl.load(vectors) + b * tl.load(vectors + 3) + c * tl.load(vectors + 6)
    dy = tl.load(at + 1, mask=exists, other=0.0) - y
    dy += a * tl.load(vectors + 1) + b * tl.load(vectors + 4) + c * tl.load(vectors + 7)
    dz = tl.load(at + 2, mask=exists, other=0.0) - z
    dz += a * tl.load(vectors + 2) + b * tl.load(vectors + 5) + c * tl.load(vectors + 8)
    squared = dx * dx + dy * dy + dz * dz
    return tl.where(exists & (squared > NEAREST), squared, -1.0)


@triton.jit
def _how_far(
    pos, cell, repeats, structures, starts, farthest, nearer, counts, cutoff, wanted, T: tl.constexpr,
    STRICT: tl.constexpr, NEAREST: tl.constexpr, SAME: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0)
    structure = tl.load(structures + atom)
    first = tl.load(starts + structure)
    last = tl.load(starts + structure + 1)
    x, y, z = tl.load(pos + atom * 3), tl.load(pos + atom * 3 + 1), tl.load(pos + atom * 3 + 2)
    images = 2 * tl.load(repeats + structure * 3) + 1
    images *= 2 * tl.load(repeats + structure * 3 + 1) + 1
    images *= 2 * tl.load(repeats + structure * 3 + 2) + 1
    candidates = images * (last - first)
    t = tl.arange(0, T)
    total = tl.zeros((T,), dtype=tl.int32)
    for start in range(0, candidates, T):
        squared = _squared_distance(
            start + t, pos, cell, repeats, x, y, z, structure, first, last, T, NEAREST
        )  # fmt: skip
        total += ((squared >= 0.0) & (squared <= cutoff)).to(tl.int32)
    within = tl.sum(total, axis=0)
    # The squared distance of the last one wanted, or of the first one too many: the smallest with so many.
    rank = wanted if STRICT else wanted + 1
    low = tl.zeros((1,), dtype=tl.int32)
    high = (tl.zeros((1,), dtype=tl.float32) + cutoff).to(tl.int32, bitcast=True)
    for _ in range(32):
        middle = low + (high - low) // 2
        total = tl.zeros((T,), dtype=tl.int32)
        for start in range(0, candidates, T):
            squared = _squared_distance(
                start + t, pos, cell, repeats, x, y, z, structure, first, last, T, NEAREST
            )  # fmt: skip
            bits = squared.to(tl.int32, bitcast=True)
            total += ((bits >= 0) & (bits <= middle)).to(tl.int32)
        enough = tl.sum(total, axis=0) >= rank
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, tl.minimum(middle + 1, high))
    limit = tl.sum(high.to(tl.float32, bitcast=True), axis=0)
    limit = tl.where(within >= rank, limit, cutoff + 1.0)
    if not STRICT:
        limit = tl.where(within >= rank, limit + TOLERANCE, limit)
    closer = tl.zeros((T,), dtype=tl.int32)
    kept = tl.zeros((T,), dtype=tl.int32)
    for start in range(0, candidates, T):
        squared = _squared_distance(
            start + t, pos, cell, repeats, x, y, z, structure, first, last, T, NEAREST
        )  # fmt: skip
        inside = (squared >= 0.0) & (squared <= cutoff)
        closer += (inside & (squared < limit - SAME)).to(tl.int32)
        kept += (inside & (squared <= limit)).to(tl.int32)
    count = tl.minimum(within, wanted) if STRICT else tl.sum(kept, axis=0)
    tl.store(farthest + atom, limit)
    tl.store(nearer + atom, tl.sum(closer, axis=0))
    tl.store(counts + atom, count)


@triton.jit
def _fill(
    pos, cell, repeats, structures, starts, farthest, nearer, pointers, sources, offsets, cutoff, wanted,
    T: tl.constexpr, STRICT: tl.constexpr, NEAREST: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0)
    structure = tl.load(structures + atom)
    first = tl.load(starts + structure)
    last = tl.load(starts + structure + 1)
    x, y, z = tl.load(pos + atom * 3), tl.load(pos + atom * 3 + 1), tl.load(pos + atom * 3 + 2)
    rx = tl.load(repeats + structure * 3)
    ry = tl.load(repeats + structure * 3 + 1)
    rz = tl.load(repeats + structure * 3 + 2)
    ny, nz = 2 * ry + 1, 2 * rz + 1
    images = (2 * rx + 1) * ny * nz
    candidates = images * (last - first)
    limit = tl.load(farthest + atom)
    left = wanted - tl.load(nearer + atom)
    place = tl.load(pointers + atom)
    t = tl.arange(0, T)
    for start in range(0, candidates, T):
        candidate = start + t
        squared = _squared_distance(
            candidate, pos, cell, repeats, x, y, z, structure, first, last, T, NEAREST
        )  # fmt: skip
        kept = (squared >= 0.0) & (squared <= cutoff)
        if STRICT:
            # By atom and image among those that are as far.
            as_far = (kept & (squared >= limit - SAME) & (squared <= limit + SAME)).to(tl.int32)
            before = tl.cumsum(as_far, axis=0) - as_far
            kept = kept & ((squared < limit - SAME) | ((as_far > 0) & (before < left)))
            left -= tl.sum(as_far, axis=0)
        else:
            kept = kept & (squared <= limit)
        number = kept.to(tl.int32)
        where = place + tl.cumsum(number, axis=0) - number
        image = candidate % images
        tl.store(sources + where, (first + candidate // images).to(tl.int64), mask=kept)
        tl.store(offsets + where * 3, image // (ny * nz) - rx, mask=kept)
        tl.store(offsets + where * 3 + 1, (image // nz) % ny - ry, mask=kept)
        tl.store(offsets + where * 3 + 2, image % nz - rz, mask=kept)
        place += tl.sum(number, axis=0)


def neighbours(
    pos: Tensor,
    cell: Tensor,
    batch: Tensor,
    natoms: Tensor,
    pbc: Tensor,
    cutoff: float,
    max_neighbors: int,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours of each atom; the device is asked once, for the number of edges.

    Args:
        pos: (N, 3), Å, each within its cell along periodic directions.
        cell: (B, 3, 3), lattice vectors in rows, Å.
        batch: (N,), ascending, which structure an atom belongs to.
        natoms: (B,).
        pbc: (B, 3) bool, periodic directions.
        cutoff: Å.
        max_neighbors: how many are wanted.
        strict: exactly ``max_neighbors`` at most, of those at the same distance the first ones by atom and
            image; else neighbours as far as the first one too many, to 0.01 Å², are kept too.

    Returns:
        Edges (2, E), source and target, sorted by target, source and image; and the images of the sources,
        (E, 3) int32, in lattice vectors.
    """
    pos, cell, structures = pos.float().contiguous(), cell.float().contiguous(), batch.int().contiguous()
    normals = torch.stack([torch.linalg.cross(cell[:, i - 2], cell[:, i - 1]) for i in range(3)], dim=1)
    volumes = (cell[:, 0] * normals[:, 0]).sum(dim=1, keepdim=True)
    heights = torch.linalg.vector_norm(normals, dim=2) / volumes.abs()
    repeats = torch.where(pbc, (cutoff * heights).ceil(), torch.zeros_like(heights)).int().contiguous()
    starts = torch.nn.functional.pad(natoms.cumsum(0), (1, 0)).int()
    farthest, nearer = torch.empty_like(pos[:, 0]), torch.empty_like(structures)
    counts = torch.empty_like(structures)
    shared = (pos, cell, repeats, structures, starts, farthest, nearer)
    constants = {
        "T": _CANDIDATES, "STRICT": strict, "NEAREST": SAME_ATOM, "SAME": SAME_DISTANCE, "num_warps": 4,
    }  # fmt: skip
    launch(
        _how_far,
        (len(pos),),
        pos,
        *shared,
        counts,
        cutoff**2,
        max_neighbors,
        TOLERANCE=TOLERANCE,
        **constants,
    )
    pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    total = int(pointers[-1])
    source, offsets = batch.new_empty(total, dtype=torch.long), structures.new_empty(total, 3)
    launch(_fill, (len(pos),), pos, *shared, pointers, source, offsets, cutoff**2, max_neighbors, **constants)
    atoms = torch.arange(len(pos), device=pos.device)
    target = torch.repeat_interleave(atoms, counts, output_size=total)
    return torch.stack([source, target]), offsets
