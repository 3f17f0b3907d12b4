"""The product with a quantised weight against the product with what the weight stands for."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from model.modes import Mode
from model.quantization import QuantizedWeight, quantize

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels.quantized_product import quantized_product
from model.kernels.weight_tiles import WeightStack, tiling_for


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize(
    ("rows", "columns", "out", "dtype"),
    [(1, 192, 70, torch.float32), (17, 64, 33, torch.float16), (70, 64, 16, torch.float32), (0, 64, 8, torch.float32)],
)
def test_it_is_the_product(mode: Mode, rows: int, columns: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = quantize(torch.randn(out, columns, generator=generator) / columns**0.5, mode)
    x_TI = torch.randn(rows, columns, generator=generator).to(dtype)
    expected_TO = (x_TI.float() @ weight.dequantize(dtype).float().T).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    found_TO = quantized_product(x_TI, WeightStack.of_one(weight))
    torch.testing.assert_close(found_TO, expected_TO, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("group_size", "groups"), [(32, 7), (64, 3), (128, 2), (256, 2), (96, 3), (136, 1)])
def test_groups_of_any_size(group_size: int, groups: int) -> None:
    """Several to a tile of 128 columns, one, a part of one, and such as do not fit."""
    generator = torch.Generator().manual_seed(group_size)
    columns = group_size * groups
    packed_OP = torch.randint(0, 256, (20, columns // 2), dtype=torch.uint8, generator=generator)
    weight = QuantizedWeight("int4", packed_OP, torch.rand(20, groups, generator=generator))
    x_TI = torch.randn(3, columns, generator=generator).half()
    expected_TO = x_TI.float() @ weight.dequantize(torch.float16).float().T
    found_TO = quantized_product(x_TI, WeightStack.of_one(weight))
    torch.testing.assert_close(found_TO.float(), expected_TO, rtol=4e-3, atol=4e-2)


def test_every_code_is_exact() -> None:
    """Each byte there is, in the modes that have one scale per row, through a product with one."""
    codes = torch.arange(256, dtype=torch.uint8)
    scale_OG, eye = torch.ones(1, 1), torch.eye(256)
    finite = (codes & 0x7F) != 0x7F  # e4m3's two that are no numbers
    for mode, packed in (("int8", codes.view(torch.int8)), ("fp8", codes.where(finite, 0).view(torch.float8_e4m3fn))):
        found = quantized_product(eye, WeightStack.quantized(mode, packed.view(1, 1, 256), scale_OG[None]))
        assert torch.equal(found[:, 0], packed.float())


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_grow_with_the_rows_and_fit_shared_memory(itemsize: int) -> None:
    tilings = [tiling_for(rows, itemsize) for rows in (0.5, 16, 17, 33, 65, 4096)]
    assert [tiling.rows for tiling in tilings] == [16, 16, 32, 64, *([128] * 2 if itemsize == 2 else [64] * 2)]
    for tiling in tilings:
        assert tiling.stages * (tiling.rows + tiling.columns) * tiling.depth * itemsize <= 99 << 10
