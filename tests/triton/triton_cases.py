"""Arguments for the Triton kernels: on a GPU, or in the interpreter where there is none."""

import functools

import linear_cases

NORM = ["dora_squares_fwd_kernel", "dora_gain_fwd_kernel"]
DEVICE = linear_cases.device_for("triton")
make = functools.partial(linear_cases.make, "triton")
reference_results = functools.partial(linear_cases.reference_results, "triton")
