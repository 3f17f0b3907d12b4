"""The fused norm against the sum and the norm that the CPU computes one after the other."""

from __future__ import annotations

import pytest
import torch

from model.layers import rms_norm

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels.norm import add_norm, norm

SHAPES = [(1, 64), (3, 40), (5, 1), (2, 130), (4, 2049)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize(("parts", "dtype"), [(1, torch.float32), (2, torch.float16), (3, torch.float32)])
def test_a_sum_and_its_norm(rows: int, width: int, parts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    x_SD = torch.randn(rows, width, generator=generator).to(dtype)
    delta_SKD = torch.randn(rows, parts, width, generator=generator) * 3
    weight_D = torch.randn(width, generator=generator).to(dtype)
    sum_SD, normed_SD = add_norm(x_SD, delta_SKD, weight_D, 1e-5)
    expected_SD = x_SD + delta_SKD.sum(1).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(sum_SD, expected_SD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(normed_SD, rms_norm(sum_SD, weight_D, 1e-5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_what_is_added_may_have_the_shape_of_the_sum(rows: int, width: int) -> None:
    x_SD, delta_SD = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(0)).unbind()
    weight_D = torch.ones(width)
    for found, expected in zip(
        add_norm(x_SD, delta_SD, weight_D, 1e-5), add_norm(x_SD, delta_SD[:, None], weight_D, 1e-5), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_norm_alone(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x_SD, weight_D = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    torch.testing.assert_close(norm(x_SD, weight_D, 1e-6), rms_norm(x_SD, weight_D, 1e-6), rtol=1e-6, atol=1e-6)


def test_no_rows() -> None:
    empty_SD, weight_D = torch.empty(0, 8), torch.ones(8)
    assert norm(empty_SD, weight_D, 1e-5).shape == (0, 8)
    assert [x.shape for x in add_norm(empty_SD, empty_SD, weight_D, 1e-5)] == [(0, 8), (0, 8)]
