"""Where rows, Wigner entries and the edges of a node lie, for kernels; `fairchem_dens.ops.layout` says why.

Orders are known when a kernel is compiled, degrees may be.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(degree, order: tl.constexpr, LMAX: tl.constexpr):
    """Row of a degree and a signed order in order-major arrays."""
    if order == 0:
        row = degree
    elif order > 0:
        row = LMAX + 1 + (order - 1) * (2 * LMAX + 2 - order) + degree - order
    else:
        row = LMAX + 1 + (-order - 1) * (2 * LMAX + 2 + order) + degree + order + (LMAX + 1 + order)
    return row


@triton.jit
def radial_row_of(degree, order: tl.constexpr, LMAX: tl.constexpr):
    """Row of a degree and an order in the radial weights, which both signs of the order share."""
    return order * (LMAX + 1) - (order * (order - 1)) // 2 + degree - order


@triton.jit
def packed_row(degree, order: tl.constexpr, MMAX: tl.constexpr):
    """Where the row of a degree and a signed order starts among the packed Wigner entries of an edge."""
    near = (degree * (2 * degree - 1) * (2 * degree + 1)) // 3
    far = ((MMAX + 1) * (2 * MMAX + 1) * (2 * MMAX + 3)) // 3 + (2 * MMAX + 1) * (
        degree * degree - (MMAX + 1) * (MMAX + 1)
    )
    start = tl.where(degree <= MMAX + 1, near, far)
    return start + (tl.where(degree < MMAX, degree, MMAX) + order) * (2 * degree + 1)


@triton.jit
def edges_into(node, row_ptr, EACH: tl.constexpr):
    """First edge into a node, and how many there are: so many into each, or as the pointers say with 0."""
    if EACH > 0:
        first = node.to(tl.int64) * EACH
        count = EACH
    else:
        first = tl.load(row_ptr + node).to(tl.int64)
        count = tl.load(row_ptr + node + 1).to(tl.int64) - first
    return first, count


@triton.jit
def rescale(degree, MMAX: tl.constexpr):
    """What makes up for the orders that were left out; see `Rows.rescale`."""
    left_out = tl.sqrt((2 * degree + 1).to(tl.float32) / (2 * MMAX + 1))
    return tl.where(degree > MMAX, left_out, 1.0)
