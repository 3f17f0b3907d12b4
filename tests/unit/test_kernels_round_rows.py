"""Rows rounded to fp8: torch's own cast decides, and a row of zeros stays one."""

from __future__ import annotations

import pytest
import torch

from model.quantization import FP8_MAX

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels.round_rows import round_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(0, 16), (1, 1), (3, 1024), (5, 1500)])
def test_rows_are_rounded_as_torch_does(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x_TI = (torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    x_TI[2:3] = 0
    x_TI[:, 1:] *= torch.logspace(0, -4, columns - 1)  # down to numbers below fp8's smallest exponent, and to zero
    code_TI, scale_T = round_rows(x_TI)
    expected_T = x_TI.float().abs().amax(-1).clamp_min(1e-12) / FP8_MAX
    assert torch.equal(scale_T, expected_T)
    assert torch.equal(code_TI.float(), (x_TI.float() / expected_T[:, None]).to(torch.float8_e4m3fn).float())


def test_ties_go_to_the_even_number_and_fractions_carry() -> None:
    x_TI = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 1.0, 0.97]])
    code_TI, _ = round_rows(x_TI)
    assert code_TI.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8, 1.0, 1.0]]
