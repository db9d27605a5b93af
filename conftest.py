"""Where there is no GPU, Triton kernels run in its interpreter; it must be told before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
