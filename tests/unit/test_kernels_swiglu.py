"""The fused activation against the CPU's."""

from __future__ import annotations

import pytest
import torch

from model import moe

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels.swiglu import swiglu


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1030), (2, 1024), (0, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_silu_of_one_half_times_the_other(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(swiglu(gate_up), moe.swiglu(gate_up.clone()), rtol=tolerance, atol=tolerance)
