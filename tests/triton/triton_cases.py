"""Arguments for the Triton kernels: on a GPU, or in the interpreter where there is none."""

import functools

import linear_cases

DEVICE = linear_cases.device_for("triton")
make = functools.partial(linear_cases.make, "triton")
reference_results = functools.partial(linear_cases.reference_results, "triton")
