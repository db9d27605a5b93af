"""[..., width] as rows."""

import torch

from echolora_kernels.ops.echo_lora_linear.rows import as_rows, one_sample


def test_rows_are_views():
    x = torch.empty(2, 3, 4, 5)
    assert as_rows(x).shape == (6, 4, 5) and as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(torch.empty(5)).shape == (1, 1, 5)
    assert one_sample(torch.empty(2, 3, 5)).shape == (1, 6, 5)
    apart = torch.empty(2, 4, 5)[:, :3]
    assert one_sample(apart) is apart
