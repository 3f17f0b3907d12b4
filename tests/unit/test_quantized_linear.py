"""Every way of multiplying with quantised weights is a product with what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from model import quantized_linear
from model.modes import Mode
from model.quantization import QuantizedWeight, quantize
from model.quantized_linear import (
    KERNEL_ROWS,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    KernelLinear,
    QuantizedLinear,
    make_quantized_linear,
)

MODES: tuple[Mode, ...] = ("int8", "int4", "nf4", "fp8")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(mode: Mode, rows: int = 48, columns: int = 128) -> QuantizedWeight:
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 65])
@pytest.mark.parametrize("features", [48, 40, 1200])
def test_it_multiplies_with_what_the_weight_stands_for(
    mode: Mode, dtype: torch.dtype, rows: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear, "CPU_PIECE", 1000)  # several pieces, the last one smaller
    weight = make(mode, features)
    linear = make_quantized_linear(replace(weight, packed_OP=weight.packed_OP.clone()), dtype)
    assert (linear.in_features, linear.out_features) == (128, features)
    x_TI = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)).to(dtype)[:, 10:138]
    expected_TO = functional.linear(x_TI, weight.dequantize(dtype))
    found_TO = linear(x_TI)
    assert found_TO.dtype == dtype
    torch.testing.assert_close(found_TO, expected_TO, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(linear.weight_OI, weight.dequantize(dtype))
    # torch's int4 kernel wants a zero point beside each scale.
    zeros = weight.scale_OG.nbytes if isinstance(linear, Int4Linear) else 0
    assert linear.nbytes == weight.nbytes + zeros


def test_kernels_are_taken_where_they_are_exact_and_fast() -> None:
    int8, int4 = make("int8"), make("int4")
    assert isinstance(make_quantized_linear(int8, torch.bfloat16), Int8Linear)
    assert isinstance(make_quantized_linear(int4, torch.bfloat16), Int4Linear)
    others = [make_quantized_linear(make(mode), torch.float32) for mode in MODES]
    # A scale that bfloat16 cannot hold, rows that the kernel does not take, groups it does not know.
    others += [
        make_quantized_linear(replace(weight, scale_OG=weight.scale_OG.float() * 1.001), torch.bfloat16)
        for weight in (int8, int4)
    ]
    others.append(make_quantized_linear(make("int4", 40), torch.bfloat16))
    others.append(make_quantized_linear(make("int8", 48, 72), torch.bfloat16))
    sixteens = replace(int4, scale_OG=int4.scale_OG.repeat_interleave(4, dim=1))
    others.append(make_quantized_linear(sixteens, torch.bfloat16))
    assert [type(linear) for linear in others] == [QuantizedLinear] * 9


def test_a_torch_without_the_kernels_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.quantized_linear.has_int8_kernel", lambda weight, dtype: False)
    monkeypatch.setattr("model.quantized_linear.has_int4_kernel", lambda weight, dtype: False)
    for mode in MODES:
        assert type(make_quantized_linear(make(mode), torch.bfloat16)) is QuantizedLinear


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [0, 2, KERNEL_ROWS + 1])
def test_our_own_kernel_multiplies_the_same(mode: Mode, rows: int) -> None:
    pytest.importorskip("triton", reason="kernels run in Triton's interpreter")
    weight = make(mode)
    x_TI = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))[:, 10:138]
    linear = KernelLinear(weight, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(linear(x_TI), QuantizedLinear(weight, torch.float32)(x_TI), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_fp8_times_fp8_rounds_rows_to_fp8(rows: int) -> None:
    """torch's scaled product runs on a CPU too, so the class for Hopper can be held against its definition here."""
    weight = make("fp8")
    x_TI = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
    x_TI[:1] = 0
    rounded = quantize(x_TI, "fp8").dequantize(torch.float32) if rows else x_TI.float()
    expected_TO = rounded @ weight.dequantize(torch.float32).T
    found_TO = Fp8Linear(weight)(x_TI)
    assert found_TO.dtype == torch.bfloat16
    torch.testing.assert_close(found_TO.float(), expected_TO, rtol=0.1, atol=0.05)
    assert torch.equal(found_TO[:1], torch.zeros_like(found_TO[:1]))
