"""The arithmetic of EquiformerV2, without modules or parameters.

Everything here is plain PyTorch that runs anywhere; it is the reference for kernels that do the same faster.
Nothing is imported from the rest of the package.
"""
