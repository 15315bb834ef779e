"""Triton kernels: each module has the name and the signature of its plain twin in `fairchem_dens.ops`.

Nothing here is imported unless `fairchem_dens.ops.dispatch` chose it, so Triton is not needed to run on a
CPU. The kernels keep to what Triton 3.0 knows. Their tile sizes are fixed: choosing them by timing would
let the order of sums, and with it the last bits of a result, depend on the run.
"""
