"""The operators, one folder each.

A folder holds `reference.py` (plain PyTorch, float64-clean: the specification) and, where it has them, the kernels,
their launchers and the autograd Function. The public functions are in `echolora_kernels.functional`.
"""
