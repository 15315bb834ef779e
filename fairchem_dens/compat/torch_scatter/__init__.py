"""Stand-in for torch_scatter on plain torch: sums, means, products, minima and maxima of groups of values.

It follows the real package where callers can tell: groups without values are 0 (1 for products), `out` takes
part in the reduction and is written to, minimum and maximum pass their gradient to one element, the first of
equals. It does not go through torch_geometric's `scatter`, which knows neither `out` nor an index of more
than one dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_dens.compat.absent import absent_function

from .utils import broadcast

__version__ = "0+fairchem.dens"


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduces the values that share an index along one dimension.

    Args:
        src: Values.
        index: Group of each value, integer, broadcast to `src` by `utils.broadcast`.
        dim: Dimension of `src` to reduce along.
        out: Tensor to reduce into; its values take part, groups without values keep them.
        dim_size: Size of the result along `dim` without `out`; by default the largest index plus one.
        reduce: `sum` (or `add`), `mean`, `mul`, `min` or `max`.

    Returns:
        The reduced values, `src`'s shape with `dim` resized (or `out`).

    Raises:
        ValueError: For another `reduce`.
    """
    if reduce in ("sum", "add"):
        return scatter_sum(src, index, dim, out, dim_size)
    if reduce == "mul":
        return scatter_mul(src, index, dim, out, dim_size)
    if reduce == "mean":
        return scatter_mean(src, index, dim, out, dim_size)
    if reduce == "min":
        return scatter_min(src, index, dim, out, dim_size)[0]
    if reduce == "max":
        return scatter_max(src, index, dim, out, dim_size)[0]
    raise ValueError(f"reduce must be one of sum, add, mean, mul, min, max; found {reduce!r}.")


def scatter_sum(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Sum of each group; arguments as for `scatter`."""
    index = broadcast(index, src, dim)
    if out is None:
        out = src.new_zeros(_reduced_shape(src, index, dim, dim_size))
    return out.scatter_add_(dim, index, src)


scatter_add = scatter_sum


def scatter_mul(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Product of each group; arguments as for `scatter`.

    The gradient is right where a factor is 0; the real package's is 0 there.
    """
    index = broadcast(index, src, dim)
    if out is None:
        out = src.new_ones(_reduced_shape(src, index, dim, dim_size))
    return out.scatter_reduce_(dim, index, src, reduce="prod", include_self=True)


def scatter_mean(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Mean of each group; arguments as for `scatter`.

    As in the real package, `out` enters the sum but not the count, and integers are divided with rounding
    down.
    """
    index = broadcast(index, src, dim)
    out = scatter_sum(src, index, dim, out, dim_size)
    count = torch.zeros_like(out).scatter_add_(dim, index, torch.ones_like(src)).clamp_(min=1)
    return out.div_(count) if out.is_floating_point() else out.div_(count, rounding_mode="floor")


def scatter_min(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Minimum of each group and its position along `dim`; arguments as for `scatter`.

    The position is `src.size(dim)` where the group has no value or a value of `out` is the smaller.
    """
    return _extremum(src, index, dim, out, dim_size, "amin")


def scatter_max(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum of each group and its position along `dim`; see `scatter_min`."""
    return _extremum(src, index, dim, out, dim_size, "amax")


def segment_coo(
    src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None, reduce: str = "sum"
) -> Tensor:
    """Reduces like `scatter` along the last dimension of `index`, which is sorted there.

    Args:
        src: Values.
        index: Sorted groups; its dimensions are the leading ones of `src`.
        out: As for `scatter`.
        dim_size: As for `scatter`.
        reduce: As for `scatter`.

    Returns:
        The reduced values.
    """
    return scatter(src, _leading(index, src), index.dim() - 1, out, dim_size, reduce)


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Reduces contiguous segments along the last dimension of `indptr`.

    Args:
        src: Values.
        indptr: Where segments start and end, one entry more than segments; leading dimensions broadcast to
            `src`'s.
        out: Tensor to overwrite with the result.
        reduce: As for `scatter`.

    Returns:
        The reduced values, `src`'s shape with that dimension as long as there are segments.
    """
    dim = indptr.dim() - 1
    segments = indptr.size(dim) - 1
    positions, inside = _segment_of_position(indptr, src, src.size(dim))
    # Values before the first and after the last segment belong to none: they go to one group more, which is
    # dropped.
    index = torch.where(inside, positions, segments)
    result = scatter(src, _leading(index, src), dim, None, segments + 1, reduce).narrow(dim, 0, segments)
    return result if out is None else out.copy_(result)


def gather_coo(src: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies each group's value to its members: the inverse of `segment_coo`."""
    dim = index.dim() - 1
    shape = [*src.shape[:dim], index.size(dim), *src.shape[dim + 1 :]]
    index = index.view(*index.shape, *[1] * (src.dim() - index.dim()))
    result = src.gather(dim, index.expand(shape))
    return result if out is None else out.copy_(result)


def gather_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies each segment's value to its members: the inverse of `segment_csr`.

    Raises:
        ValueError: If `indptr` does not cover its range from 0 on.
    """
    dim = indptr.dim() - 1
    length = int(indptr.flatten()[-1])
    if bool((indptr.select(dim, 0) != 0).any()) or bool((indptr.select(dim, -1) != length).any()):
        raise ValueError("gather_csr: indptr must start at 0 and end at the same position in every row.")
    positions, _ = _segment_of_position(indptr, src, length)
    return gather_coo(src, positions, out)


def __getattr__(name: str) -> object:
    # Any other function of the package, so that importing it does not fail where it is never called.
    if name.startswith("_"):
        raise AttributeError(f"module 'torch_scatter' has no attribute {name!r}")
    return absent_function("torch-scatter", name)


def _reduced_shape(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> list[int]:
    shape = list(src.shape)
    if dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    shape[dim] = dim_size
    return shape


def _extremum(
    src: Tensor, index: Tensor, dim: int, out: Tensor | None, dim_size: int | None, reduce: str
) -> tuple[Tensor, Tensor]:
    index = broadcast(index, src, dim)
    dim = dim % src.dim()
    none = src.size(dim)
    values = src.detach()
    start = src.new_zeros(_reduced_shape(src, index, dim, dim_size)) if out is None else out.detach()
    best = start.scatter_reduce(dim, index, values, reduce=reduce, include_self=out is not None)

    # Torch's own gradient of a minimum is shared among equals. Taking the value from one position instead
    # gives the whole gradient to that one, as torch_scatter does, and the position is part of the answer
    # anyway.
    best_of_group = best.gather(dim, index)
    attained = (values == best_of_group) | (values.isnan() & best_of_group.isnan())
    positions = torch.arange(none, device=src.device).view(-1, *[1] * (src.dim() - dim - 1)).expand_as(index)
    candidates = torch.where(attained, positions, none)
    position = torch.full_like(best, none, dtype=torch.long)
    position = position.scatter_reduce(dim, index, candidates, reduce="amin", include_self=True)
    if out is not None:
        position = torch.where(start == best, none, position)

    filler = src.new_zeros([*src.shape[:dim], 1, *src.shape[dim + 1 :]])
    result = torch.cat([src, filler], dim).gather(dim, position)
    if out is not None:
        result = out.copy_(torch.where(position == none, out, result))
    return result, position


def _leading(index: Tensor, src: Tensor) -> Tensor:
    """Expands an index of leading dimensions of `src` to all of `src`."""
    index = index.view(*index.shape, *[1] * (src.dim() - index.dim()))
    return index.expand_as(src)


def _segment_of_position(indptr: Tensor, src: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For `length` positions: the segment that each lies in, and whether it lies in any."""
    rows = src.shape[: indptr.dim() - 1]
    indptr = indptr.expand(*rows, indptr.size(-1)).contiguous()
    positions = torch.arange(length, device=indptr.device).expand(*rows, length).contiguous()
    segment = torch.searchsorted(indptr, positions, right=True) - 1
    return segment, (segment >= 0) & (segment < indptr.size(-1) - 1)
