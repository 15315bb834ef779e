"""The tensor product of atoms, edges and weights as one operation that is closed under differentiation.

For an edge e, with features x, matrices M (Clebsch-Gordan coefficients times spherical harmonics) and weights
w, the output is

    out[e, k, p, c] = w[e, p, c] · Σ_i M[e, k, i] x[e, i, c]

for each path p, its components k and channels c. Multiplied by g and summed over everything this is a form
S(x, M, w, g), linear in each of the four. The operation and its gradients are the derivatives of S by one of
them; the derivatives of these are again sums of such terms. So two functions are enough for all orders:
`_Product`, which is ∂S/∂g, and `_Gradients`, which is (∂S/∂x, ∂S/∂M, ∂S/∂w). Forces trained by gradient
descent need the second order. Nothing between input and output is stored, and each part of an output is
written once, where it belongs.

Source: e3nn's tensor products with connection mode 'uvu' (arXiv 2207.09453), restated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 128
"""Edges at a time on a CPU: what passes between two steps then stays in its cache."""


class Block(NamedTuple):
    """All paths from one source to one target: they differ in the edge's degree alone.

    Attributes:
        source, target: places in the lists of inputs and outputs.
        paths: how many.
        row: first row in the source's matrix; each path has as many as the target has components.
        channel: first channel in the target; each path has as many as the source.
    """

    source: int
    target: int
    paths: int
    row: int
    channel: int


@dataclass(frozen=True)
class Layout:
    """What is coupled to what, and where it stands.

    Attributes:
        channels: of each source.
        rows: of each source's matrix.
        components: of each target.
        widths: channels of each target.
        blocks: all of them.
    """

    channels: tuple[int, ...]
    rows: tuple[int, ...]
    components: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, channels: Sequence[int], components: Sequence[int], paths: Sequence[Sequence[int]]) -> Layout:
        """Lay out rows by target and channels by source.

        Args:
            channels: of each source.
            components: of each target.
            paths: how many lead from each source to each target.
        """
        rows = [[0, *accumulate(p * d for p, d in zip(counts, components, strict=True))] for counts in paths]
        columns = [
            [0, *accumulate(counts[target] * mul for counts, mul in zip(paths, channels, strict=True))]
            for target in range(len(components))
        ]
        blocks = tuple(
            Block(source, target, count, rows[source][target], columns[target][source])
            for source, counts in enumerate(paths)
            for target, count in enumerate(counts)
            if count
        )
        return cls(
            tuple(channels),
            tuple(one[-1] for one in rows),
            tuple(components),
            tuple(one[-1] for one in columns),
            blocks,
        )

    @property
    def weight_numel(self) -> int:
        """Number of weights of an edge: one for each channel of each target."""
        return sum(self.widths)


def trilinear(
    x: Sequence[Tensor],
    matrices: Sequence[Tensor],
    weights: Tensor | None,
    layout: Layout,
    matrices_once: bool = False,
) -> list[Tensor]:
    """Couple features with matrices, and weight the result.

    In mixed precision all is done in the widest type among the inputs.

    Args:
        x: for each source (E, D, C).
        matrices: for each source (E, K, D), rows by target, path and component.
        weights: (E, W), by target, source, path and channel; None for ones.
        layout: of all of them.
        matrices_once: matrices have gradients only in a backward pass that is recorded itself
            (``create_graph=True``). For forces in training: that pass yields them, and the one that follows
            is for the weights of the network alone.

    Returns:
        For each target (E, components, width), channels by source and path.
    """
    inputs = [*x, *matrices, *([] if weights is None else [weights])]
    kind = inputs[0].dtype
    for one in inputs[1:]:
        kind = torch.promote_types(kind, one.dtype)
    count = len(layout.channels)
    inputs = [one.to(kind) for one in inputs]
    weighting = inputs[-1] if weights is not None else None
    return list(_Product.apply(layout, matrices_once, weighting, *inputs[: 2 * count]))  # type: ignore[no-untyped-call]


def trilinear_plain(
    x: Sequence[Tensor], matrices: Sequence[Tensor], weights: Tensor | None, layout: Layout
) -> list[Tensor]:
    """The same, as torch operations one by one: the reference for tests."""
    parts: list[list[Tensor]] = [[] for _ in layout.components]
    products = [matrix @ one for matrix, one in zip(matrices, x, strict=True)]
    for block in sorted(layout.blocks, key=lambda one: one.channel):
        rows = _of_source(products[block.source], block, layout)
        parts[block.target].append(rows.transpose(1, 2).flatten(2))
    out = [torch.cat(one, dim=2) for one in parts]
    if weights is None:
        return out
    by_target = weights.split(list(layout.widths), dim=1)
    return [one * weight[:, None] for one, weight in zip(out, by_target, strict=True)]


class _Product(torch.autograd.Function):
    """∂S/∂g."""

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, matrices_once: bool, weights: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.matrices_once = layout, matrices_once
        ctx.save_for_backward(weights, *inputs)
        count = len(layout.channels)
        x, matrices = inputs[:count], inputs[count:]
        out = _empty_targets(layout, x[0])
        with _in_full_precision(x[0]):
            for edges in _chunks(x[0]):
                products = [torch.bmm(m[edges], one[edges]) for m, one in zip(matrices, x, strict=True)]
                _write_targets([one[edges] for one in out], products, _part(weights, edges), layout)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weights, *inputs = ctx.saved_tensors
        wanted = _wanted(ctx.needs_input_grad[2:], ctx.layout, ctx.matrices_once)
        gradients = tuple(one.contiguous() for one in gradients)
        by_weights, *others = _Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.layout, wanted, ctx.matrices_once, weights, *inputs, *gradients
        )
        return None, None, by_weights, *others


class _Gradients(torch.autograd.Function):
    """(∂S/∂w, ∂S/∂x, ∂S/∂M)."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        wanted: Sequence[bool],
        matrices_once: bool,
        weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.layout, ctx.matrices_once = layout, matrices_once
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, *inputs)
        with _in_full_precision(inputs[0]):
            return _Gradients._computed(layout, wanted, weights, inputs)

    @staticmethod
    def _computed(
        layout: Layout, wanted: Sequence[bool], weights: Tensor | None, inputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        count = len(layout.channels)
        x, matrices, gradients = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        by_weights = torch.empty_like(weights) if wanted[0] and weights is not None else None
        by_x = [torch.empty_like(one) if want else None for one, want in zip(x, wanted[1:], strict=False)]
        by_matrices = [
            torch.empty_like(one) if want else None
            for one, want in zip(matrices, wanted[1 + count :], strict=True)
        ]
        for edges in _chunks(x[0]):
            parts = [one[edges] for one in gradients]
            rows = _read_targets(parts, _part(weights, edges), layout)
            for source, one in enumerate(rows):
                if (out := by_x[source]) is not None:
                    torch.bmm(matrices[source][edges].mT, one, out=out[edges])
                if (out := by_matrices[source]) is not None:
                    torch.bmm(one, x[source][edges].mT, out=out[edges])
            if by_weights is not None:
                products = [torch.bmm(m[edges], one[edges]) for m, one in zip(matrices, x, strict=True)]
                _write_weights(by_weights[edges], parts, products, layout)
        return by_weights, *by_x, *by_matrices

    @staticmethod
    def backward(ctx: Any, along_weights: Tensor | None, *along: Tensor | None) -> tuple[Any, ...]:
        weights, *inputs = ctx.saved_tensors
        count = len(ctx.layout.channels)
        x, matrices, gradients = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]

        def filled(given: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(b) if a is None else a for a, b in zip(given, like, strict=True)]

        along_x, along_matrices = filled(along[:count], x), filled(along[count:], matrices)
        if along_weights is None and weights is not None:
            along_weights = torch.zeros_like(weights)
        arguments = (x, matrices, weights, gradients, along_x, along_matrices, along_weights)
        second = _second_by_parts if torch.is_grad_enabled() else _second
        wanted = _wanted(ctx.needs_input_grad[3:], ctx.layout, ctx.matrices_once)
        return None, None, None, *second(ctx.layout, wanted, *arguments)


def _wanted(needed: Sequence[bool], layout: Layout, matrices_once: bool) -> list[bool]:
    """Which inputs (weights, features, matrices, what follows) need a gradient in this pass."""
    count = len(layout.channels)
    matrices = range(1 + count, 1 + 2 * count)
    dropped = matrices_once and not torch.is_grad_enabled()
    return [need and not (dropped and place in matrices) for place, need in enumerate(needed)]


def _second(
    layout: Layout,
    wanted: Sequence[bool],
    x: Sequence[Tensor],
    matrices: Sequence[Tensor],
    weights: Tensor | None,
    gradients: Sequence[Tensor],
    along_x: Sequence[Tensor],
    along_matrices: Sequence[Tensor],
    along_weights: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of ∂S/∂w · v_w + ∂S/∂x · v_x + ∂S/∂M · v_M by w, x, M and g, in one pass over the edges."""
    count = len(layout.channels)
    by_weights = torch.empty_like(weights) if wanted[0] and weights is not None else None
    by_x = [torch.empty_like(one) if want else None for one, want in zip(x, wanted[1:], strict=False)]
    by_matrices = [
        torch.empty_like(one) if want else None
        for one, want in zip(matrices, wanted[1 + count :], strict=False)
    ]
    by_gradients = _empty_targets(layout, x[0])
    for edges in _chunks(x[0]):
        parts, weight = [one[edges] for one in gradients], _part(weights, edges)
        along_weight = _part(along_weights, edges)
        turned, rows, along_rows = [], _read_targets(parts, weight, layout), None
        for matrix, one, along_matrix, along_one in zip(matrices, x, along_matrices, along_x, strict=True):
            product = torch.bmm(matrix[edges], along_one[edges])
            turned.append(product.baddbmm_(along_matrix[edges], one[edges]))
        targets = [one[edges] for one in by_gradients]
        _write_targets(targets, turned, weight, layout)
        if along_weight is not None:
            products = [torch.bmm(m[edges], one[edges]) for m, one in zip(matrices, x, strict=True)]
            _write_targets(targets, products, along_weight, layout, add=True)
            along_rows = _read_targets(parts, along_weight, layout)
        for source in range(count):
            if (out := by_x[source]) is not None:
                part = torch.bmm(along_matrices[source][edges].mT, rows[source], out=out[edges])
                if along_rows is not None:
                    part.baddbmm_(matrices[source][edges].mT, along_rows[source])
            if (out := by_matrices[source]) is not None:
                part = torch.bmm(rows[source], along_x[source][edges].mT, out=out[edges])
                if along_rows is not None:
                    part.baddbmm_(along_rows[source], x[source][edges].mT)
        if by_weights is not None:
            _write_weights(by_weights[edges], parts, turned, layout)
    return [by_weights, *by_x, *by_matrices, *by_gradients]


def _second_by_parts(
    layout: Layout,
    wanted: Sequence[bool],
    x: Sequence[Tensor],
    matrices: Sequence[Tensor],
    weights: Tensor | None,
    gradients: Sequence[Tensor],
    along_x: Sequence[Tensor],
    along_matrices: Sequence[Tensor],
    along_weights: Tensor | None,
) -> list[Tensor | None]:
    """The same, as a sum of the two operations: it can be differentiated again, any number of times."""
    count = len(layout.channels)
    turns = [(along_x, matrices, weights, 1), (x, along_matrices, weights, 1 + count)]
    if along_weights is not None:
        turns.append((x, matrices, along_weights, 0))
    total: list[Tensor | None] = [None] * (1 + 2 * count + len(gradients))

    def add(place: int, value: Tensor | None) -> None:
        if value is not None:
            so_far = total[place]
            total[place] = value if so_far is None else so_far + value

    for some_x, some_matrices, some_weights, turned in turns:
        # A form that is linear in what was replaced has no gradient by what it replaced.
        left_out = range(turned, turned + (count if turned else 1))
        asked = [want and place not in left_out for place, want in enumerate(wanted[: 1 + 2 * count])]
        for place, one in enumerate(
            _Gradients.apply(layout, asked, False, some_weights, *some_x, *some_matrices, *gradients)  # type: ignore[no-untyped-call]
        ):
            add(place, one)
        outputs = _Product.apply(layout, False, some_weights, *some_x, *some_matrices)  # type: ignore[no-untyped-call]
        for place, one in enumerate(outputs):
            add(1 + 2 * count + place, one)
    return total


def _in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keep mixed precision out: what is written into memory that is already there has its type."""
    if x.device.type in ("cpu", "cuda"):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _chunks(x: Tensor) -> list[slice]:
    """All edges: in one piece, or on a CPU in pieces that fit into its cache."""
    if x.device.type != "cpu" or len(x) <= CHUNK:
        return [slice(None)]
    return [slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)]


def _part(values: Tensor | None, edges: slice) -> Tensor | None:
    return None if values is None else values[edges]


def _empty_targets(layout: Layout, like: Tensor) -> list[Tensor]:
    shapes = zip(layout.components, layout.widths, strict=True)
    return [like.new_empty(len(like), components, width) for components, width in shapes]


def _of_source(rows: Tensor, block: Block, layout: Layout) -> Tensor:
    """The rows of a block as (E, paths, components, channels), from (E, K, channels)."""
    components = layout.components[block.target]
    chosen = rows[:, block.row : block.row + block.paths * components]
    return chosen.view(len(rows), block.paths, components, -1)


def _of_target(target: Tensor, block: Block, layout: Layout) -> Tensor:
    """The channels of a block as (E, paths, components, channels), from (E, components, width)."""
    channels = layout.channels[block.source]
    chosen = target[..., block.channel : block.channel + block.paths * channels]
    return chosen.view(*target.shape[:-1], block.paths, channels).transpose(-3, -2)


def _of_weights(weights: Tensor, block: Block, layout: Layout) -> Tensor:
    """The weights of a block as (E, paths, channels), from (E, W)."""
    start = sum(layout.widths[: block.target]) + block.channel
    channels = layout.channels[block.source]
    return weights[:, start : start + block.paths * channels].view(len(weights), block.paths, channels)


def _write_targets(
    targets: Sequence[Tensor],
    products: Sequence[Tensor],
    weights: Tensor | None,
    layout: Layout,
    add: bool = False,
) -> None:
    """Put rows of sources, weighted, where they belong in the targets, or add them to what is there."""
    for block in layout.blocks:
        rows = _of_source(products[block.source], block, layout)
        target = _of_target(targets[block.target], block, layout)
        if weights is None:
            target.copy_(rows)
        elif add:
            target.addcmul_(rows, _of_weights(weights, block, layout)[:, :, None])
        else:
            torch.mul(rows, _of_weights(weights, block, layout)[:, :, None], out=target)


def _read_targets(targets: Sequence[Tensor], weights: Tensor | None, layout: Layout) -> list[Tensor]:
    """The transposed of `_write_targets`: rows of sources (E, K, C) out of targets."""
    out = [
        targets[0].new_empty(len(targets[0]), rows, channels)
        for rows, channels in zip(layout.rows, layout.channels, strict=True)
    ]
    for block in layout.blocks:
        rows = _of_source(out[block.source], block, layout)
        target = _of_target(targets[block.target], block, layout)
        if weights is None:
            rows.copy_(target)
        else:
            torch.mul(target, _of_weights(weights, block, layout)[:, :, None], out=rows)
    return out


def _write_weights(
    out: Tensor, targets: Sequence[Tensor], products: Sequence[Tensor], layout: Layout
) -> None:
    """Sum over components what targets and rows of sources have in common."""
    for block in layout.blocks:
        rows = _of_source(products[block.source], block, layout)
        target = _of_target(targets[block.target], block, layout)
        torch.sum(rows * target, dim=2, out=_of_weights(out, block, layout))
